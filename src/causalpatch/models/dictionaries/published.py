"""Dictionaries as they are published: which layout a file or folder has, and what it says.

===============  ================================================================  ============================
layout           files                                                             says its sites
===============  ================================================================  ============================
SAELens          ``cfg.json``, ``sae_weights.safetensors``                         yes
sparsify         ``cfg.json``, ``sae.safetensors``                                 by the folder: ``layers.3.mlp``
circuit-tracer   ``config.yaml``, ``layer_3.safetensors`` for each layer           yes
Gemma Scope      ``params.npz`` or ``params.safetensors``                          no
===============  ================================================================  ============================

A folder of such folders holds a dictionary of several layers. What a layout says and is not applied here is refused.

References:
    SAELens, ``loading/pretrained_sae_loaders.py``; EleutherAI's sparsify, ``sparse_coder.py``; circuit-tracer,
    ``transcoder/single_layer_transcoder.py``; Lieberum et al. 2024, "Gemma Scope", 2408.05147.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from causalpatch.base.errors import ModelNotFound, ModelUnsupported
from causalpatch.models.dictionaries.coder import Activation, Recipe
from causalpatch.models.dictionaries.weights import TensorFile, Weights
from causalpatch.sites.aliases import translate

MLP_IN = "mlp_in"
_CONFIG, _SAELENS, _SPARSIFY = "cfg.json", "sae_weights.safetensors", "sae.safetensors"
_SCOPE = ("params.npz", "params.safetensors")
_LAYER_FILE = re.compile(r"layer_(\d+)\.safetensors")
# TransformerLens' names of what goes into an MLP, behind its norm.
_MLP_INPUT = re.compile(r"blocks\.(\d+)\.(?:ln2\.hook_normalized|mlp\.hook_in)")
_HOOKPOINT = re.compile(r"(?:layers|h)\.(\d+)(\.mlp)?")


@dataclass(frozen=True)
class Published:
    """One layer of a dictionary, as its files describe it.

    Args:
        path: The file of the weights.
        layout: Name of the layout.
        architecture: What the layout calls the arithmetic.
        recipe: The arithmetic.
        weights: Its tensors.
        writes: The site that it describes, as text; None where the layout does not say.
        reads: The site that it encodes, or ``mlp_in.LAYER``, where that is another one.
        is_transcoder: Whether it encodes something else than it describes.
        is_processed: Whether it was trained on a model whose weights TransformerLens had centred and folded; None
            where the layout does not say.
        needs_scale: Whether vectors must be scaled by a number that the files do not hold.
        model: Name of the model that it was trained on, or "".
    """

    path: Path
    layout: str
    architecture: str
    recipe: Recipe
    weights: Weights
    writes: str | None = None
    reads: str | None = None
    is_transcoder: bool = False
    is_processed: bool | None = False
    needs_scale: bool = False
    model: str = ""


def read(path: Path) -> list[Published]:
    """Read what is published in a file or folder; weights are left for later.

    Args:
        path: A file or folder of one of the layouts, or a folder of such folders.

    Raises:
        ModelNotFound: There is no dictionary of a known layout.
        ModelUnsupported: A setting of it is not applied here; the message says which.
    """
    if path.is_file():
        return [_read_file(path)]
    found = _read_folder(path) if path.is_dir() else []
    if not found and path.is_dir():
        found = [one for folder in sorted(path.iterdir()) if folder.is_dir() for one in _read_folder(folder)]
    if not found:
        inside = ", ".join(sorted(each.name for each in path.iterdir())[:6]) if path.is_dir() else "no such folder"
        raise ModelNotFound(
            f"there is no dictionary in '{path}'",
            facts=[
                ("holds", inside or "nothing"),
                ("known", f"{_CONFIG} and {_SAELENS} or {_SPARSIFY}; {_SCOPE[0]}; config.yaml and layer_0.safetensors"),
            ],
            fix="give the folder that holds them; from the hub, download it first",
        )
    return found


def _read_folder(folder: Path) -> list[Published]:
    config = folder / _CONFIG
    if config.is_file() and (folder / _SAELENS).is_file():
        return [read_saelens(_json(config), folder / _SAELENS)]
    if config.is_file() and (folder / _SPARSIFY).is_file():
        return [_read_sparsify(_json(config), folder / _SPARSIFY)]
    for name in _SCOPE:
        if (folder / name).is_file():
            return [_read_scope(folder / name)]
    layers = sorted(each for each in folder.iterdir() if _LAYER_FILE.fullmatch(each.name))
    return [_read_traced(each) for each in layers] if (folder / "config.yaml").is_file() else []


def _read_file(path: Path) -> Published:
    if path.name == _SAELENS and path.with_name(_CONFIG).is_file():
        return read_saelens(_json(path.with_name(_CONFIG)), path)
    if path.name == _SPARSIFY and path.with_name(_CONFIG).is_file():
        return _read_sparsify(_json(path.with_name(_CONFIG)), path)
    if _LAYER_FILE.fullmatch(path.name):
        return _read_traced(path)
    return _read_scope(path)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelNotFound(f"'{path}' is no JSON: {error}", fix="give the file as it was published") from error
    if not isinstance(found, dict):
        raise ModelNotFound(f"'{path}' holds no settings", fix="give the file as it was published")
    return found


# --- SAELens -----------------------------------------------------------------------------------------------------

_ARCHITECTURES: dict[str, tuple[Activation, bool, bool]] = {  # activation, is a transcoder, has a skip connection
    "standard": ("relu", False, False),
    "gated": ("gated", False, False),
    "jumprelu": ("jumprelu", False, False),
    "topk": ("topk", False, False),
    "transcoder": ("relu", True, False),
    "skip_transcoder": ("relu", True, True),
    "jumprelu_transcoder": ("jumprelu", True, False),
    "jumprelu_skip_transcoder": ("jumprelu", True, True),
}
_TENSORS: dict[Activation, tuple[str, ...]] = {
    "relu": ("b_enc",),
    "tanh-relu": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "r_mag", "b_mag"),
}
_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
# All that a configuration of SAELens 6 holds for use; what else stands in one would be applied by a later version.
_SETTINGS = {"architecture", "d_in", "d_sae", "d_out", "dtype", "device", "apply_b_dec_to_input", "metadata", "k"}
_SETTINGS |= {"normalize_activations", "reshape_activations", "rescale_acts_by_decoder_norm"}
SCALED = "expected_average_only_in"


def read_saelens(config: dict[str, Any], path: Path) -> Published:
    """Read a dictionary as SAELens saves it, of version 6 or earlier.

    Args:
        config: What ``cfg.json`` holds.
        path: The weights.

    Raises:
        ModelUnsupported: A setting is not applied here.
        ModelNotFound: The weights lack a tensor.
    """
    told = {_RENAMED.get(name, name): value for name, value in config.items()}
    told = {**told, **(told.get("metadata") or {})}
    if "metadata" in config and (unknown := sorted(set(config) - _SETTINGS)):
        _refuse(path, f"the settings {', '.join(unknown)}", "settings of SAELens 6 for use are known, these are not")
    architecture = str(told.get("architecture") or "standard")
    if architecture not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        _refuse(path, f"the architecture {architecture!r}", f"known are {known}; batchtopk is saved as jumprelu")
    activation, is_transcoder, has_skip = _ARCHITECTURES[architecture]
    activation, k = _activation(told, activation, path)
    recipe = Recipe(
        activation,
        k=k,
        takes_bias=bool(told.get("apply_b_dec_to_input", not is_transcoder)),
        normalization=_normalization(told, path),
        restores=not is_transcoder,
        by_decoder_norm=bool(told.get("rescale_acts_by_decoder_norm", False)),
    )
    if is_transcoder and recipe.takes_bias:
        _refuse(path, "apply_b_dec_to_input in a transcoder", "the bias is that of the output")
    if told.get("hook_head_index") is not None:
        _refuse(path, f"hook_head_index {told['hook_head_index']}", "dictionaries of single heads are not read")
    names = {"encoder": "W_enc", "decoder": "W_dec", "b_dec": "b_dec", **{n: n for n in _TENSORS[activation]}}
    names |= {"skip": "W_skip"} if has_skip else {}
    weights = _weights(path, names, told)
    hook, out = (str(told[name]) if told.get(name) else None for name in ("hook_name", "hook_name_out"))
    return Published(
        path,
        "SAELens",
        architecture,
        recipe,
        weights,
        writes=_site(out if is_transcoder else hook),
        reads=_site(hook) if is_transcoder else None,
        is_transcoder=is_transcoder,
        is_processed=_is_processed(told, hook),
        needs_scale=told.get("normalize_activations") in (True, SCALED),
        model=str(told.get("model_name") or ""),
    )


def _activation(told: dict[str, Any], activation: Activation, path: Path) -> tuple[Activation, int]:
    """Return what makes features, with the names of earlier versions, and how many are active."""
    named, settings = told.get("activation_fn") or "relu", told.get("activation_fn_kwargs") or {}
    k = told.get("k", settings.get("k"))
    if unknown := sorted(set(settings) - {"k"}):
        _refuse(path, f"the activation's {', '.join(unknown)}", "only k is applied")
    if named not in ("relu", "tanh-relu", "topk") or (named != "relu" and activation not in ("relu", "topk")):
        _refuse(path, f"the activation {named!r} in {told.get('architecture')!r}", "known are relu, tanh-relu and topk")
    if named == "tanh-relu":
        return "tanh-relu", 0
    if named != "topk" and activation != "topk":
        return activation, 0
    if not (isinstance(k, int) and k > 0):
        _refuse(path, f"k = {k!r}", "a top-k dictionary needs a whole number of active features")
    return "topk", k


def _normalization(told: dict[str, Any], path: Path) -> Any:
    named = told.get("normalize_activations") or "none"
    if named in (True, SCALED):
        return "none"  # a scale that is given apart: see `needs_scale`
    if named not in ("none", "layer_norm", "constant_norm_rescale"):
        known = f"none, layer_norm, constant_norm_rescale, {SCALED}"
        _refuse(path, f"normalize_activations {named!r}", f"known are {known}")
    return named


def _weights(path: Path, names: dict[str, str], told: dict[str, Any]) -> Weights:
    file = TensorFile(path)
    weights = Weights.of(file, names, turned=("encoder",))
    _require_tensors(file, weights, names)
    scales = [name for name in ("finetuning_scaling_factor", "scaling_factor") if name in file.shapes]
    for name in scales:
        factors = file.load(name)
        if bool((factors == 1).all()):
            continue
        if not told.get("finetuning_scaling_factor"):
            _refuse(path, f"the tensor {name}", "its configuration says that there is no finetuning_scaling_factor")
        weights = weights.with_tensor("finetuned", factors)
    more = sorted(set(file.shapes) - set(names.values()) - set(scales))
    if more:
        _refuse(path, f"the tensor{'s' * (len(more) > 1)} {', '.join(more)}", f"known are {', '.join(names.values())}")
    return weights


def _is_processed(told: dict[str, Any], hook: str | None) -> bool | None:
    """Say whether a dictionary was trained on weights that TransformerLens had processed; None where nothing is said.

    SAELens notes with which settings TransformerLens loaded the model. Without any it centres what writes into the
    stream and folds the weights of norms into what reads it.
    """
    if told.get("model_class_name") not in (None, "HookedTransformer"):
        return False
    loaded = told.get("model_from_pretrained_kwargs") or {}
    concerned = "fold_ln" if hook is not None and _MLP_INPUT.fullmatch(hook) else "center_writing_weights"
    return False if loaded.get(concerned) is False else None


# --- other layouts -----------------------------------------------------------------------------------------------


def _read_sparsify(config: dict[str, Any], path: Path) -> Published:
    """Read a sparse coder as EleutherAI's sparsify saves it: top-k, named for the module that it stands at."""
    for name, plain in {"activation": "topk", "signed": False, "embed_skip": False, "gram_lookup": False}.items():
        if config.get(name, plain) != plain:
            _refuse(path, f"{name} = {config[name]!r}", f"known is {plain!r}")
    is_transcoder, has_skip = bool(config.get("transcode", False)), bool(config.get("skip_connection", False))
    names = {"encoder": "encoder.weight", "b_enc": "encoder.bias", "decoder": "W_dec", "b_dec": "b_dec"}
    names |= {"skip": "W_skip"} if has_skip else {}
    file = TensorFile(path)
    weights = Weights.of(file, names)
    _require_tensors(file, weights, names)
    found = _HOOKPOINT.fullmatch(path.parent.name)
    writes = None if found is None else f"mlp_out.{found[1]}" if found[2] else f"resid_post.{found[1]}"
    reads = f"{MLP_IN}.{found[1]}" if found and is_transcoder and found[2] else None
    recipe = Recipe("topk", k=int(config["k"]), takes_bias=not is_transcoder, restores=not is_transcoder)
    return Published(path, "sparsify", "topk", recipe, weights, writes, reads, is_transcoder)


def _read_traced(path: Path) -> Published:
    """Read a transcoder of one layer as circuit-tracer saves it; the encoder lies as (feature, width)."""
    beside = path.with_name("config.yaml")
    told = yaml.safe_load(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    told = told if isinstance(told, dict) else {}
    if told.get("model_kind", "transcoder_set") != "transcoder_set":
        _refuse(path, f"model_kind {told['model_kind']!r}", "known is transcoder_set: one layer in, the same layer out")
    file = TensorFile(path)
    threshold = "activation_function.threshold"
    activation: Activation = "jumprelu" if threshold in file.shapes else "relu"
    names = {"encoder": "W_enc", "decoder": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
    names |= {"threshold": threshold} if activation == "jumprelu" else {}
    if unknown := sorted(set(file.shapes) - {*names.values(), "W_skip"}):
        _refuse(path, f"the tensor {unknown[0]}", "known are relu and JumpReLU transcoders")
    if told.get("activation", activation) not in (activation, None):
        _refuse(path, f"activation {told['activation']!r}", "known are relu and JumpReLU transcoders")
    weights = Weights.of(file, {**names, "skip": "W_skip"})
    _require_tensors(file, weights, names)
    layer = int(_LAYER_FILE.fullmatch(path.name)[1])  # type: ignore[index]  # the name was matched before
    hooks = [told.get(name) for name in ("feature_output_hook", "feature_input_hook")]
    writes, reads = (None if hook is None else _site(f"blocks.{layer}.{hook}") for hook in hooks)
    recipe = Recipe(activation, clamps=activation == "relu", restores=False)
    name = str(told.get("model_name") or "")
    return Published(path, "circuit-tracer", activation, recipe, weights, writes, reads, is_transcoder=True, model=name)


def _read_scope(path: Path) -> Published:
    """Read a JumpReLU dictionary as Gemma Scope publishes it: arrays alone."""
    file = TensorFile(path)
    big = "W_" if "W_enc" in file.shapes else "w_"
    names = {"encoder": f"{big}enc", "decoder": f"{big}dec", "b_enc": "b_enc", "b_dec": "b_dec"}
    names |= {"threshold": "threshold"}
    if unknown := sorted(set(file.shapes) - set(names.values())):
        known = ", ".join(names.values())
        _refuse(path, f"the tensor {unknown[0]}", f"arrays without settings are read as Gemma Scope's: {known}")
    weights = Weights.of(file, names, turned=("encoder",))
    _require_tensors(file, weights, names)
    return Published(path, "Gemma Scope", "jumprelu", Recipe("jumprelu"), weights)


def _site(hook: str | None) -> str | None:
    """Return the site that a hook of TransformerLens names, as text; None where it names none."""
    if hook is None:
        return None
    found = _MLP_INPUT.fullmatch(hook)
    if found:
        return f"{MLP_IN}.{found[1]}"
    text = translate(hook.replace("hook_mlp_in", "hook_resid_mid"))
    return None if text == hook else text


def _require_tensors(file: TensorFile, weights: Weights, names: dict[str, str]) -> None:
    missing = [own for name, own in names.items() if name not in weights.shapes]
    if missing:
        raise ModelNotFound(
            f"the dictionary '{file.path}' lacks the tensor{'s' * (len(missing) > 1)} {', '.join(missing)}",
            facts=[("holds", ", ".join(sorted(file.shapes)) or "nothing")],
            fix="give the file as it was published",
        )


def _refuse(path: Path, what: str, why: str) -> NoReturn:
    raise ModelUnsupported(
        f"the dictionary '{path}' cannot be used: {what}",
        facts=[("why", why), ("else", "its features would be other numbers than those that were published")],
        fix="add a torch module with encode and decode that computes it",
    )
