"""Activation patching for any PyTorch or Hugging Face model.

Replace activations of one run of a network by those of another, measure how a behaviour changes, and so find which
layers, positions, heads and neurons cause it::

    import causalpatch as cp

    model = cp.open_model("zoo:stories")
    pairs = cp.load_pairs("ioi", model)
    experiment = cp.Experiment(model, pairs, metric=cp.logit_difference, direction="denoise")
    heads = cp.sweep(experiment, "z")
    print(heads.top(5))

Importing the package loads nothing heavy: each name is imported when it is first used (PEP 562).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from causalpatch.base.errors import CausalPatchError, IntegrityError, RequestError, UnsupportedError
    from causalpatch.experiment import Baseline, Experiment
    from causalpatch.metrics import (
        METRICS,
        Metric,
        Outputs,
        answer_logit,
        cosine,
        cross_entropy,
        kl_divergence,
        kl_from_base,
        log_probability,
        log_probability_difference,
        logit_difference,
        metric,
        probability,
        probability_difference,
        rank,
        top1,
    )
    from causalpatch.models import Model, open_model
    from causalpatch.pairs import Pair, Pairs, load_pairs
    from causalpatch.patches import Constant, Function, Identity, Intervention, Mean, Patch, Source, Zero
    from causalpatch.results.effects import Effects
    from causalpatch.sites import Site, SiteSet, parse
    from causalpatch.sweeps import sweep

_ROOMS = {
    "base.errors": ("CausalPatchError", "IntegrityError", "RequestError", "UnsupportedError"),
    "experiment": ("Baseline", "Experiment"),
    "metrics": (
        "METRICS",
        "Metric",
        "Outputs",
        "answer_logit",
        "cosine",
        "cross_entropy",
        "kl_divergence",
        "kl_from_base",
        "log_probability",
        "log_probability_difference",
        "logit_difference",
        "metric",
        "probability",
        "probability_difference",
        "rank",
        "top1",
    ),
    "models": ("Model", "open_model"),
    "pairs": ("Pair", "Pairs", "load_pairs"),
    "patches": ("Constant", "Function", "Identity", "Intervention", "Mean", "Patch", "Source", "Zero"),
    "results.effects": ("Effects",),
    "sites": ("Site", "SiteSet", "parse"),
    "sweeps": ("sweep",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__version__ = "0.1.0"
__all__ = ["__version__", *_ROOM_OF]


def __getattr__(name: str) -> Any:
    room = _ROOM_OF.get(name)
    if room is None:
        raise AttributeError(f"module 'causalpatch' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"causalpatch.{room}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
