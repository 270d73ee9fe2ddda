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
    from causalpatch.algorithms.causal_model import CausalModel as CausalModel
    from causalpatch.algorithms.hypothesis import Hypothesis as Hypothesis
    from causalpatch.algorithms.interchange import Interchange as Interchange
    from causalpatch.algorithms.interchange import interchange_accuracy as interchange_accuracy
    from causalpatch.algorithms.scrubbing import Scrubbing as Scrubbing
    from causalpatch.algorithms.scrubbing import causal_scrubbing as causal_scrubbing
    from causalpatch.algorithms.strict import StrictTest as StrictTest
    from causalpatch.algorithms.strict import strict_test as strict_test
    from causalpatch.attribution import EdgeScores as EdgeScores
    from causalpatch.attribution import Scores as Scores
    from causalpatch.attribution import attribute as attribute
    from causalpatch.attribution import attribute_edges as attribute_edges
    from causalpatch.attribution import confirm_scores as confirm_scores
    from causalpatch.base.errors import (
        CausalPatchError as CausalPatchError,
    )
    from causalpatch.base.errors import (
        IllusionWarning as IllusionWarning,
    )
    from causalpatch.base.errors import (
        IntegrityError as IntegrityError,
    )
    from causalpatch.base.errors import (
        RequestError as RequestError,
    )
    from causalpatch.base.errors import (
        UnsupportedError as UnsupportedError,
    )
    from causalpatch.circuits.acdc import acdc as acdc
    from causalpatch.circuits.bounds import Violation as Violation
    from causalpatch.circuits.bounds import completeness as completeness
    from causalpatch.circuits.bounds import minimality as minimality
    from causalpatch.circuits.circuit import Circuit as Circuit
    from causalpatch.circuits.discover import discover_circuit as discover_circuit
    from causalpatch.circuits.evaluate import evaluate_circuit as evaluate_circuit
    from causalpatch.circuits.exact import graph_of as graph_of
    from causalpatch.circuits.exact import patch_edges as patch_edges
    from causalpatch.circuits.graph_files import GraphFile as GraphFile
    from causalpatch.circuits.graph_files import read_graph as read_graph
    from causalpatch.circuits.graph_files import write_graph as write_graph
    from causalpatch.circuits.learn import learn_circuit as learn_circuit
    from causalpatch.circuits.learn import learn_edges as learn_edges
    from causalpatch.circuits.minimal import minimality_test as minimality_test
    from causalpatch.circuits.stability import Stability as Stability
    from causalpatch.circuits.stability import stability as stability
    from causalpatch.experiment import (
        Baseline as Baseline,
    )
    from causalpatch.experiment import (
        Experiment as Experiment,
    )
    from causalpatch.experiment import (
        off_distribution as off_distribution,
    )
    from causalpatch.experiment.making import make_pairs as make_pairs
    from causalpatch.metrics import (
        METRICS as METRICS,
    )
    from causalpatch.metrics import (
        Generation as Generation,
    )
    from causalpatch.metrics import (
        Metric as Metric,
    )
    from causalpatch.metrics import (
        Outputs as Outputs,
    )
    from causalpatch.metrics import (
        answer_logit as answer_logit,
    )
    from causalpatch.metrics import (
        cosine as cosine,
    )
    from causalpatch.metrics import (
        cross_entropy as cross_entropy,
    )
    from causalpatch.metrics import (
        generated_answer as generated_answer,
    )
    from causalpatch.metrics import (
        kl_divergence as kl_divergence,
    )
    from causalpatch.metrics import (
        kl_from_base as kl_from_base,
    )
    from causalpatch.metrics import (
        log_probability as log_probability,
    )
    from causalpatch.metrics import (
        log_probability_difference as log_probability_difference,
    )
    from causalpatch.metrics import (
        logit_difference as logit_difference,
    )
    from causalpatch.metrics import (
        metric as metric,
    )
    from causalpatch.metrics import (
        probability as probability,
    )
    from causalpatch.metrics import (
        probability_difference as probability_difference,
    )
    from causalpatch.metrics import (
        rank as rank,
    )
    from causalpatch.metrics import (
        top1 as top1,
    )
    from causalpatch.models import (
        Dictionary as Dictionary,
    )
    from causalpatch.models import (
        Model as Model,
    )
    from causalpatch.models import (
        open_model as open_model,
    )
    from causalpatch.pairs import (
        Pair as Pair,
    )
    from causalpatch.pairs import (
        Pairs as Pairs,
    )
    from causalpatch.pairs import (
        load_pairs as load_pairs,
    )
    from causalpatch.pairs.made import MadePairs as MadePairs
    from causalpatch.patches import (
        Constant as Constant,
    )
    from causalpatch.patches import (
        Fitted as Fitted,
    )
    from causalpatch.patches import (
        FittedOn as FittedOn,
    )
    from causalpatch.patches import (
        From as From,
    )
    from causalpatch.patches import (
        Function as Function,
    )
    from causalpatch.patches import (
        Given as Given,
    )
    from causalpatch.patches import (
        Identity as Identity,
    )
    from causalpatch.patches import (
        Interpolate as Interpolate,
    )
    from causalpatch.patches import (
        Intervention as Intervention,
    )
    from causalpatch.patches import (
        Mean as Mean,
    )
    from causalpatch.patches import (
        Noise as Noise,
    )
    from causalpatch.patches import (
        Optimal as Optimal,
    )
    from causalpatch.patches import (
        OtherPrompts as OtherPrompts,
    )
    from causalpatch.patches import (
        Patch as Patch,
    )
    from causalpatch.patches import (
        ProjectOut as ProjectOut,
    )
    from causalpatch.patches import (
        Resample as Resample,
    )
    from causalpatch.patches import (
        Source as Source,
    )
    from causalpatch.patches import (
        Steer as Steer,
    )
    from causalpatch.patches import (
        Subspace as Subspace,
    )
    from causalpatch.patches import (
        Zero as Zero,
    )
    from causalpatch.patches import (
        load_interventions as load_interventions,
    )
    from causalpatch.patches import (
        save_interventions as save_interventions,
    )
    from causalpatch.results.beside import beside as beside
    from causalpatch.results.claim import Claim as Claim
    from causalpatch.results.confirmation import Confirmation as Confirmation
    from causalpatch.results.effects import Effects as Effects
    from causalpatch.results.evaluation import Evaluation as Evaluation
    from causalpatch.results.localization import Localization as Localization
    from causalpatch.results.planning import Power as Power
    from causalpatch.results.race import Race as Race
    from causalpatch.results.selection import SelectionStability as SelectionStability
    from causalpatch.results.tuning import Margins as Margins
    from causalpatch.results.tuning import TuningReport as TuningReport
    from causalpatch.sites import (
        Edge as Edge,
    )
    from causalpatch.sites import (
        Path as Path,
    )
    from causalpatch.sites import (
        Receiver as Receiver,
    )
    from causalpatch.sites import (
        Site as Site,
    )
    from causalpatch.sites import (
        SiteSet as SiteSet,
    )
    from causalpatch.sites import (
        parse as parse,
    )
    from causalpatch.sites.graph import (
        Graph as Graph,
    )
    from causalpatch.studies.debug import debug as debug
    from causalpatch.studies.debugging import Debugging as Debugging
    from causalpatch.studies.reading import read_study as read_study
    from causalpatch.studies.running import run_study as run_study
    from causalpatch.studies.study import Study as Study
    from causalpatch.subspaces import (
        Alignment as Alignment,
    )
    from causalpatch.subspaces import (
        RotationSearch as RotationSearch,
    )
    from causalpatch.subspaces import (
        SubspaceControls as SubspaceControls,
    )
    from causalpatch.subspaces import (
        learn_subspace as learn_subspace,
    )
    from causalpatch.subspaces import (
        load_subspace as load_subspace,
    )
    from causalpatch.subspaces import (
        patched_accuracy as patched_accuracy,
    )
    from causalpatch.subspaces import (
        subspace_parts as subspace_parts,
    )
    from causalpatch.sweeps import (
        TopFeatures as TopFeatures,
    )
    from causalpatch.sweeps import (
        Tracing as Tracing,
    )
    from causalpatch.sweeps import (
        direct_effect as direct_effect,
    )
    from causalpatch.sweeps import (
        direct_logit_attribution as direct_logit_attribution,
    )
    from causalpatch.sweeps import (
        everything_but as everything_but,
    )
    from causalpatch.sweeps import (
        generate as generate,
    )
    from causalpatch.sweeps import (
        joint as joint,
    )
    from causalpatch.sweeps import (
        logit_lens as logit_lens,
    )
    from causalpatch.sweeps import (
        path_patch as path_patch,
    )
    from causalpatch.sweeps import (
        plan_sweep as plan_sweep,
    )
    from causalpatch.sweeps import (
        sites_of as sites_of,
    )
    from causalpatch.sweeps import (
        sweep as sweep,
    )
    from causalpatch.sweeps import (
        together as together,
    )
    from causalpatch.sweeps import (
        top_features as top_features,
    )
    from causalpatch.sweeps import (
        trace as trace,
    )
    from causalpatch.sweeps import (
        window as window,
    )
    from causalpatch.sweeps.localize import localize as localize
    from causalpatch.sweeps.localize import plan_localize as plan_localize
    from causalpatch.sweeps.localize import race as race
    from causalpatch.sweeps.stability import selection_stability as selection_stability
    from causalpatch.tuning.compare import Comparison as Comparison
    from causalpatch.tuning.compare import compare_tuning as compare_tuning
    from causalpatch.tuning.compare import plan_tuning as plan_tuning
    from causalpatch.tuning.data import TuningData as TuningData
    from causalpatch.tuning.train import Schedule as Schedule
    from causalpatch.tuning.tune import tune as tune
    from causalpatch.tuning.tuned import Tuned as Tuned
    from causalpatch.tuning.tuned import load_change as load_change
    from causalpatch.validation.confirm import Checks as Checks
    from causalpatch.validation.confirm import confirm as confirm
    from causalpatch.validation.dissociation import Dissociation as Dissociation
    from causalpatch.validation.dissociation import dissociate as dissociate
    from causalpatch.validation.power import power as power
    from causalpatch.validation.recheck import Recheck as Recheck
    from causalpatch.validation.recheck import recheck as recheck

_ROOMS = {
    "algorithms.causal_model": ("CausalModel",),
    "algorithms.hypothesis": ("Hypothesis",),
    "algorithms.interchange": ("Interchange", "interchange_accuracy"),
    "algorithms.scrubbing": ("Scrubbing", "causal_scrubbing"),
    "algorithms.strict": ("StrictTest", "strict_test"),
    "attribution": ("EdgeScores", "Scores", "attribute", "attribute_edges", "confirm_scores"),
    "base.errors": ("CausalPatchError", "IllusionWarning", "IntegrityError", "RequestError", "UnsupportedError"),
    "circuits.acdc": ("acdc",),
    "circuits.bounds": ("Violation", "completeness", "minimality"),
    "circuits.circuit": ("Circuit",),
    "circuits.discover": ("discover_circuit",),
    "circuits.evaluate": ("evaluate_circuit",),
    "circuits.exact": ("graph_of", "patch_edges"),
    "circuits.graph_files": ("GraphFile", "read_graph", "write_graph"),
    "circuits.learn": ("learn_circuit", "learn_edges"),
    "circuits.minimal": ("minimality_test",),
    "circuits.stability": ("Stability", "stability"),
    "experiment": ("Baseline", "Experiment", "off_distribution"),
    "experiment.making": ("make_pairs",),
    "metrics": (
        *("METRICS", "Generation", "Metric", "Outputs", "answer_logit", "cosine", "cross_entropy"),
        *("generated_answer", "kl_divergence", "kl_from_base", "log_probability"),
        *("log_probability_difference", "logit_difference", "metric", "probability"),
        *("probability_difference", "rank", "top1"),
    ),
    "models": ("Dictionary", "Model", "open_model"),
    "pairs": ("Pair", "Pairs", "load_pairs"),
    "pairs.made": ("MadePairs",),
    "patches": (
        *("Constant", "Fitted", "FittedOn", "From", "Function", "Given", "Identity", "Interpolate"),
        *("Intervention", "Mean", "Noise", "Optimal", "OtherPrompts", "Patch", "ProjectOut", "Resample"),
        *("Source", "Steer", "Subspace", "Zero", "load_interventions", "save_interventions"),
    ),
    "results.beside": ("beside",),
    "results.claim": ("Claim",),
    "results.confirmation": ("Confirmation",),
    "results.effects": ("Effects",),
    "results.evaluation": ("Evaluation",),
    "results.localization": ("Localization",),
    "results.race": ("Race",),
    "results.planning": ("Power",),
    "results.selection": ("SelectionStability",),
    "results.tuning": ("Margins", "TuningReport"),
    "sites": ("Edge", "Path", "Receiver", "Site", "SiteSet", "parse"),
    "sites.graph": ("Graph",),
    "studies.debug": ("debug",),
    "studies.debugging": ("Debugging",),
    "studies.reading": ("read_study",),
    "studies.running": ("run_study",),
    "studies.study": ("Study",),
    "subspaces": (
        *("Alignment", "SubspaceControls", "RotationSearch", "learn_subspace", "load_subspace"),
        *("patched_accuracy", "subspace_parts"),
    ),
    "sweeps": (
        *("TopFeatures", "Tracing", "direct_effect", "direct_logit_attribution", "everything_but", "generate"),
        *("joint", "logit_lens", "path_patch", "plan_sweep", "sites_of", "sweep", "together", "top_features"),
        *("trace", "window"),
    ),
    "sweeps.localize": ("localize", "plan_localize", "race"),
    "tuning.compare": ("Comparison", "compare_tuning", "plan_tuning"),
    "tuning.data": ("TuningData",),
    "tuning.train": ("Schedule",),
    "tuning.tune": ("tune",),
    "tuning.tuned": ("Tuned", "load_change"),
    "validation.confirm": ("Checks", "confirm"),
    "validation.dissociation": ("Dissociation", "dissociate"),
    "validation.power": ("power",),
    "validation.recheck": ("Recheck", "recheck"),
    "sweeps.stability": ("selection_stability",),
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
