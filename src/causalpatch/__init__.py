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
    from causalpatch.algorithms.interchange import (
        Interchange as Interchange,
        interchange_accuracy as interchange_accuracy,
    )
    from causalpatch.algorithms.scrubbing import Scrubbing as Scrubbing, causal_scrubbing as causal_scrubbing
    from causalpatch.algorithms.strict import StrictTest as StrictTest, strict_test as strict_test
    from causalpatch.attribution import (
        EdgeScores as EdgeScores,
        Scores as Scores,
        attribute as attribute,
        attribute_edges as attribute_edges,
        confirm_scores as confirm_scores,
    )
    from causalpatch.base.errors import (
        CausalPatchError as CausalPatchError,
        IllusionWarning as IllusionWarning,
        IntegrityError as IntegrityError,
        RequestError as RequestError,
        UnsupportedError as UnsupportedError,
    )
    from causalpatch.circuits.acdc import acdc as acdc
    from causalpatch.circuits.bounds import (
        Violation as Violation,
        completeness as completeness,
        minimality as minimality,
    )
    from causalpatch.circuits.circuit import Circuit as Circuit
    from causalpatch.circuits.discover import discover_circuit as discover_circuit
    from causalpatch.circuits.evaluate import evaluate_circuit as evaluate_circuit
    from causalpatch.circuits.exact import graph_of as graph_of, patch_edges as patch_edges
    from causalpatch.circuits.graph_files import (
        GraphFile as GraphFile,
        read_graph as read_graph,
        write_graph as write_graph,
    )
    from causalpatch.circuits.learn import learn_circuit as learn_circuit, learn_edges as learn_edges
    from causalpatch.circuits.minimal import minimality_test as minimality_test
    from causalpatch.circuits.stability import Stability as Stability, stability as stability
    from causalpatch.experiment import (
        Baseline as Baseline,
        Experiment as Experiment,
        off_distribution as off_distribution,
    )
    from causalpatch.experiment.making import make_pairs as make_pairs
    from causalpatch.metrics import (
        METRICS as METRICS,
        Generation as Generation,
        Metric as Metric,
        Outputs as Outputs,
        answer_logit as answer_logit,
        cosine as cosine,
        cross_entropy as cross_entropy,
        generated_answer as generated_answer,
        kl_divergence as kl_divergence,
        kl_from_base as kl_from_base,
        log_probability as log_probability,
        log_probability_difference as log_probability_difference,
        logit_difference as logit_difference,
        metric as metric,
        probability as probability,
        probability_difference as probability_difference,
        rank as rank,
        top1 as top1,
    )
    from causalpatch.models import (
        Dictionary as Dictionary,
        Model as Model,
        open_model as open_model,
    )
    from causalpatch.pairs import (
        Pair as Pair,
        Pairs as Pairs,
        load_pairs as load_pairs,
    )
    from causalpatch.pairs.made import MadePairs as MadePairs
    from causalpatch.patches import (
        Constant as Constant,
        Fitted as Fitted,
        FittedOn as FittedOn,
        From as From,
        Function as Function,
        Given as Given,
        Identity as Identity,
        Interpolate as Interpolate,
        Intervention as Intervention,
        Mean as Mean,
        Noise as Noise,
        Optimal as Optimal,
        OtherPrompts as OtherPrompts,
        Patch as Patch,
        ProjectOut as ProjectOut,
        Resample as Resample,
        Source as Source,
        Steer as Steer,
        Subspace as Subspace,
        Zero as Zero,
        load_interventions as load_interventions,
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
    from causalpatch.results.tuning import Margins as Margins, TuningReport as TuningReport
    from causalpatch.sites import (
        Edge as Edge,
        Path as Path,
        Receiver as Receiver,
        Site as Site,
        SiteSet as SiteSet,
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
        RotationSearch as RotationSearch,
        SubspaceControls as SubspaceControls,
        learn_subspace as learn_subspace,
        load_subspace as load_subspace,
        patched_accuracy as patched_accuracy,
        subspace_parts as subspace_parts,
    )
    from causalpatch.sweeps import (
        TopFeatures as TopFeatures,
        Tracing as Tracing,
        direct_effect as direct_effect,
        direct_logit_attribution as direct_logit_attribution,
        everything_but as everything_but,
        generate as generate,
        joint as joint,
        logit_lens as logit_lens,
        path_patch as path_patch,
        plan_sweep as plan_sweep,
        sites_of as sites_of,
        sweep as sweep,
        together as together,
        top_features as top_features,
        trace as trace,
        window as window,
    )
    from causalpatch.sweeps.localize import localize as localize, plan_localize as plan_localize, race as race
    from causalpatch.sweeps.stability import selection_stability as selection_stability
    from causalpatch.tuning.compare import compare_tuning as compare_tuning, plan_tuning as plan_tuning
    from causalpatch.tuning.comparison import Comparison as Comparison
    from causalpatch.tuning.data import TuningData as TuningData
    from causalpatch.tuning.lm_eval_tasks import lm_eval_task as lm_eval_task
    from causalpatch.tuning.train import Schedule as Schedule
    from causalpatch.tuning.tune import tune as tune
    from causalpatch.tuning.tuned import Tuned as Tuned, load_change as load_change
    from causalpatch.validation.confirm import Checks as Checks, confirm as confirm
    from causalpatch.validation.dissociation import Dissociation as Dissociation, dissociate as dissociate
    from causalpatch.validation.power import power as power
    from causalpatch.validation.recheck import Recheck as Recheck, recheck as recheck

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
    "tuning.compare": ("compare_tuning", "plan_tuning"),
    "tuning.comparison": ("Comparison",),
    "tuning.data": ("TuningData",),
    "tuning.lm_eval_tasks": ("lm_eval_task",),
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
