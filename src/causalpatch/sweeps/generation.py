"""Texts that a model writes under patches, beside those that it writes untouched."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from causalpatch.base.errors import SettingError
from causalpatch.base.extras import lazy
from causalpatch.base.tokens import Tokenizer
from causalpatch.experiment import Experiment
from causalpatch.experiment.requests import Request
from causalpatch.metrics import Generation, Metric, Outputs
from causalpatch.pairs import Pairs
from causalpatch.results.effects import Effects

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
else:
    pd, xr = lazy("pandas"), lazy("xarray")


@dataclass(frozen=True)
class Generated:
    """What a model wrote.

    Args:
        ids: Token ids, axes (intervention, pair, step), the untouched ``"base"`` and ``"source"`` runs first; -1 behind
            the token that ends the text, and everywhere in cells that could not be run.
        tokenizer: What turns them into text, or None.
        provenance: How they came to be.
    """

    ids: "xr.DataArray"
    tokenizer: Tokenizer | None
    provenance: dict[str, Any]

    def __repr__(self) -> str:
        return str(self.to_dataframe())

    def to_dataframe(self) -> "pd.DataFrame":
        """Return a row for each run and pair: intervention, pair, text (where there is a tokenizer), ids."""
        rows = []
        for run in self.ids.intervention.values.tolist():
            for pair in self.ids.pair.values.tolist():
                ids = [int(each) for each in self.ids.sel(intervention=run, pair=pair).values if each >= 0]
                text = {} if self.tokenizer is None else {"text": _text(self.tokenizer, ids)}
                rows.append({"intervention": run, "pair": pair, **text, "ids": ids})
        return pd.DataFrame(rows)


def generate(
    experiment: Experiment,
    interventions: Iterable[Request] | Request,
    *,
    max_new_tokens: int = 16,
    patched: Literal["prompt", "all"] = "prompt",
) -> Generated:
    """Let the model write on behind each pair's base prompt under each intervention, and behind untouched prompts.

    Args:
        experiment: The experiment; its metrics are not measured here.
        interventions: As for ``Experiment.run``.
        max_new_tokens: How many tokens at most.
        patched: Positions are those of the prompt. ``"prompt"`` patches it alone; ``"all"`` also patches the tokens
            that are written, see ``Generation``.

    Returns:
        The tokens of each run. The likeliest token is taken each time, so that the same call gives the same texts.

    Raises:
        MetricError: The number of tokens is impossible.
        SettingError: The pairs hold arrays.

    Cost:
        One full forward per run and token.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> experiment = cp.Experiment(model, cp.load_pairs("ioi", model).take([0]))
        >>> texts = generate(experiment, "resid_pre.0", max_new_tokens=2)
        >>> texts.ids.dims
        ('intervention', 'pair', 'step')
    """
    if experiment.pairs.kind != "tokens":
        raise SettingError(
            f"nothing is written behind the arrays of '{experiment.pairs.name}'", fix="give pairs of prompts"
        )
    how = Generation(max_new_tokens, patched)
    tokens = [Metric(f"token {step}", partial(_token, step), generates=how) for step in range(max_new_tokens)]
    effects = experiment.measuring(tokens).run(interventions)
    return Generated(_ids(effects), experiment.model.tokenizer, effects.provenance)


def _text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    decode = getattr(tokenizer, "decode", None)  # a tokenizer of one's own need not have it
    return str(decode(ids)) if callable(decode) else "".join(map(tokenizer.label, ids))


def _token(step: int, outputs: Outputs, pairs: Pairs) -> Tensor:
    del pairs
    return outputs.generated[:, step].to(torch.float64)


def _ids(effects: Effects) -> "xr.DataArray":
    found = effects.to_xarray()
    untouched = [
        found[f"baseline_{run}"].expand_dims(intervention=[run]).transpose("metric_name", "intervention", "pair")
        for run in ("base", "source")
    ]
    whole = xr.concat([*untouched, found["metric"]], dim="intervention")
    ids = whole.fillna(-1).astype(np.int64).transpose("intervention", "pair", "metric_name")
    return ids.rename(metric_name="step").assign_coords(step=np.arange(ids.sizes["metric_name"])).rename("ids")
