"""What changed inside: the same patches in the tuned model, patches from it into the base, and how fast it comes back.

* *weights outside*: that no element outside the located parts changed, by SHA-256.
* *effects before and after*: the located components and the largest others, patched in both models: others of their
  kinds, and heads and MLPs of all layers, to which the behaviour may have moved.
* *carried from the tuned model*: the located components' outputs, put into runs of the base model: the share of the
  change in the target behaviour that they bring along; beside it all other components of the model at once. Of slices
  and offsets it is all, by construction, and says that the look is right; of adapters it is a finding.
* *relearning*: the tuned model is trained on the unwanted answers, all weights; steps until half of the validation
  pairs fail again. A change that few steps undo hides the behaviour rather than removes it.

References:
    Lynch et al. 2024, "Eight Methods to Evaluate Robust Unlearning in LLMs", 2402.16835 (relearning).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from causalpatch.base.errors import CausalPatchError, UnsupportedError
from causalpatch.experiment import Experiment
from causalpatch.experiment.judging import comparing
from causalpatch.models import Model
from causalpatch.pairs import Pairs
from causalpatch.sites import Site
from causalpatch.tuning.data import TuningData
from causalpatch.tuning.train import Schedule, train
from causalpatch.tuning.tuned import Tuned, digests_outside
from causalpatch.tuning.ways import Offsets, Slices, Way
from causalpatch.tuning.whole import Full
from causalpatch.validation.components import Node, kin

Rows = tuple[dict[str, Any], ...]
_MOST_OTHERS: Final = 64
_SHOWN: Final = 6
_WHOLE: Final = ("z", "head_out", "attn_out", "mlp_out")  # patched, they are what their outputs are
_RELEARN_STEPS: Final = 30
_RELEARN_RATE: Final = 0.003
_CARRIES: Final = 0.5  # share from which on the change is said to act through the located parts
_ROUNDING: Final = 0.02  # share that is left to rounding
_WHOLE_OF: Final = {"head_out": "attn_out"}


def look_inside(
    experiment: Experiment, located: Tuned, full: Tuned | None, data: TuningData, schedule: Schedule
) -> dict[str, Rows]:
    """Return what changed inside, as tables by name; a look that cannot be made says why.

    Args:
        experiment: The base model and pairs.
        located: The tuning of the located parts.
        full: Full fine-tuning, where it was made.
        data: The data.
        schedule: How trainings went.
    """
    found: dict[str, Rows] = {}
    sites = located.way.parts.sites
    try:
        tuned = located.model()
    except UnsupportedError as error:
        return {"not looked into": ({"why": error.what},)}
    found["weights outside"] = weights_outside(located, tuned)
    looks: dict[str, Callable[[], Rows]] = {
        "effects before and after": lambda: before_and_after(experiment, tuned, sites),
        "carried from the tuned model": lambda: carried(experiment, tuned, located.way, data),
        "relearning": lambda: relearnt({"located": located, "full": full}, data, schedule),
    }
    for name, make in looks.items():
        try:
            found[name] = make()
        except CausalPatchError as error:
            found[name] = ({"not made": error.what},)
    return found


def weights_outside(located: Tuned, tuned: Model) -> Rows:
    """Return how many tensors there are, and in how many an element outside the located parts changed, by SHA-256.

    Args:
        located: The tuning of the located parts.
        tuned: The tuned model.
    """
    before, after = (digests_outside(located.way, each.module) for each in (located.base, tuned))
    return ({"tensors": len(before), "changed": sum(after[name] != digest for name, digest in before.items())},)


def before_and_after(experiment: Experiment, tuned: Model, sites: Sequence[Site]) -> Rows:
    """Return the effects of components in the base and in the tuned model, the located ones first.

    Beside them are measured others of their kinds, and all heads and MLPs (of large models attention and MLPs whole).

    Args:
        experiment: The base model and pairs.
        tuned: The tuned model.
        sites: What was located.
    """
    pool = [each.site for each in kin([Node(site) for site in sites], experiment) if isinstance(each, Node)]
    near = [*sites, *pool[:_MOST_OTHERS]]
    asked = list(dict.fromkeys([*near, *_elsewhere(near, experiment.model)]))
    both = []
    for model in (experiment.model, tuned):
        at = Experiment(
            model,
            experiment.pairs,
            experiment.metrics[0],
            experiment.direction,
            seed=experiment.seed,
            show_progress=False,
        )
        values = at.run(list(asked)).effect().values
        both.append(values.reshape(len(asked), -1).mean(1))
    before, after = both
    others = sorted(range(len(sites), len(asked)), key=lambda k: -max(abs(before[k]), abs(after[k])))[:_SHOWN]
    return tuple(
        {
            "component": str(asked[k]),
            "located": "yes" if k < len(sites) else "no",
            "effect before": float(before[k]),
            "effect after": float(after[k]),
        }
        for k in [*range(len(sites)), *others]
    )


def carried(experiment: Experiment, tuned: Model, way: Way, data: TuningData) -> Rows:
    """Return the share of the change in the target behaviour that outputs of the tuned model carry into the base.

    Slices and offsets change nothing that does not go out there, so that their share is 1 by construction: another one
    shows that the look is wrong. Adapters change whole projections, and their share is a finding.

    Args:
        experiment: The base model.
        tuned: The tuned model.
        way: The change. Of neurons their whole MLP is put in, whose output shows their weights' change, and of heads
            the whole attention where a bias took up an offset, which is no head's.
        data: The target pairs.
    """
    base, pairs = experiment.model, data.target["test"]
    if not all(pair.wrong_answer for pair in pairs):
        return ({"not made": "target pairs have no unwanted answer to compare with"},)
    own = list(dict.fromkeys(_output_of(site, base) for site in way.parts.sites))
    if isinstance(way, Offsets):
        own = list(dict.fromkeys(Site(_WHOLE_OF.get(site.name, site.name), site.layer) for site in own))
    whole = {site.layer for site in own if site.name == "attn_out"}
    every = [site for site in _outputs(base) if site not in own and not (_is_head(site) and site.layer in whole)]
    metric = comparing(pairs)
    at = Experiment(base, _fresh(pairs), metric, "denoise", source_model=tuned, show_progress=False)
    effects = at.run([own, every] if every else [own])
    shares = [float(each) for each in np.asarray(effects.recovered().values).reshape(-1)]
    rows: list[dict[str, Any]] = [{"put in": " + ".join(map(str, own)), "share": shares[0]}]
    rows[0]["said"] = _said_of(shares[0], way)
    if every:
        rows.append({"put in": f"all {len(every)} other heads and MLPs", "share": shares[1], "said": ""})
    return tuple(rows)


def _said_of(share: float, way: Way) -> str:
    if isinstance(way, Slices | Offsets):
        is_all = abs(share - 1) <= _ROUNDING
        return "by construction: nothing else was changed" if is_all else "not all, though nothing else was changed"
    return "the change acts through the located parts" if share >= _CARRIES else "the behaviour changed elsewhere"


def _is_head(site: Site) -> bool:
    return site.name == "head_out"


def relearnt(tunings: dict[str, Tuned | None], data: TuningData, schedule: Schedule) -> Rows:
    """Return how many steps on the unwanted answers undo a change.

    Args:
        tunings: The changes, by arm.
        data: The data.
        schedule: How trainings went.
    """
    if not all(pair.wrong_answer for pairs in data.target.values() for pair in pairs):
        return ({"not made": "target pairs have no unwanted answers to learn again"},)
    turned = replace(data, target={side: _turned(pairs) for side, pairs in data.target.items()})
    again = replace(
        schedule, steps=_RELEARN_STEPS, every=1, patience=_RELEARN_STEPS, keep=0.0, retain_batch=0, enough=1.0
    )
    rows = []
    for name, tuned in tunings.items():
        if tuned is None:
            continue
        way = Full(tuned.model())
        looks = train(way, turned, again, rate=_RELEARN_RATE, seed=0).looks
        step = next((each.step for each in looks if each.success >= 0.5), None)
        said = f"more than {_RELEARN_STEPS}" if step is None else f"{step}" if step else "half failed before"
        rows.append(
            {
                "arm": name,
                "steps until half fail again": said,
                "failing at the end": looks[-1].success,
            }
        )
    return tuple(rows)


def _turned(pairs: Pairs) -> Pairs:
    held = [replace(pair, answer=pair.wrong_answer, wrong_answer=pair.answer) for pair in pairs]
    return Pairs(held, name=pairs.name, tokenizer=pairs.tokenizer)


def _fresh(pairs: Pairs) -> Pairs:
    return Pairs(list(pairs), name=pairs.name, tokenizer=pairs.tokenizer)


def _output_of(site: Site, model: Model) -> Site:
    """Return the site behind a component's weights."""
    if site.name in ("z", "head_out", "q") and "head_out" not in model.shape.refused:
        return Site("head_out", site.layer, site.unit)
    if site.name in ("z", "head_out", "q", "k", "v", "attn_out"):
        return Site("attn_out", site.layer)
    return Site("mlp_out", site.layer)


def _elsewhere(known: Sequence[Site], model: Model) -> list[Site]:
    """Return heads and MLPs of all layers that are not among some sites; where they are many, attention as a whole."""
    every = _outputs(model)
    if len(every) > _MOST_OTHERS:
        every = [Site(name, layer) for layer in range(model.shape.n_layers) for name in ("attn_out", "mlp_out")]
    same = {_output_of(site, model) for site in known if site.name in _WHOLE}
    return [site for site in every if site not in same]


def _outputs(model: Model) -> list[Site]:
    """Return the outputs of all heads and MLPs, or of all attention where heads have none of their own."""
    layers, n_heads = range(model.shape.n_layers), model.shape.units.get("head", 0)
    heads = [Site("attn_out", layer) for layer in layers]
    if "head_out" not in model.shape.refused:
        heads = [Site("head_out", layer, head) for layer in layers for head in range(n_heads)]
    return [*heads, *(Site("mlp_out", layer) for layer in layers)]
