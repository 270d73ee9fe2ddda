"""Small random dictionaries, their formulas written out by themselves, and writers of each published layout.

Tensors are named and lie as SAELens has them: ``W_enc`` (width, feature), ``W_dec`` (feature, width_out).
"""

import json
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

K = 4
JUMP = 0.3


def weights(architecture="standard", width=32, features=24, width_out=None, seed=0, dtype=torch.float64):
    """Return the tensors of a random dictionary; about half of its features are active at a vector of size 1."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).mul(scale).to(dtype)

    width_out = width_out or width
    found = {
        "W_enc": normal(width, features, scale=width**-0.5),
        "W_dec": normal(features, width_out, scale=features**-0.5),
        "b_dec": normal(width_out, scale=0.2),
    }
    if architecture == "gated":
        return found | {name: normal(features, scale=0.3) for name in ("b_gate", "r_mag", "b_mag")}
    found["b_enc"] = normal(features, scale=0.3)
    if "jumprelu" in architecture:
        found["threshold"] = normal(features).abs() * JUMP
    if "skip" in architecture:
        found["W_skip"] = normal(width_out, width, scale=width**-0.5)
    return found


def encoded(architecture, w, x, bias=True, k=K):
    """Return the features of vectors, by the formula of each architecture."""
    centered = x - w["b_dec"] if bias else x
    if architecture == "gated":
        gate = centered @ w["W_enc"] + w["b_gate"] > 0
        return gate * torch.relu(centered @ (w["W_enc"] * torch.exp(w["r_mag"])) + w["b_mag"])
    pre = centered @ w["W_enc"] + w["b_enc"]
    if architecture == "topk":
        lowest = pre.sort(-1, descending=True).values[..., k - 1 : k]
        return torch.relu(pre) * (pre >= lowest)
    if "jumprelu" in architecture:
        return torch.relu(pre) * (pre > w["threshold"])
    return torch.relu(pre)


def decoded(w, features, x=None):
    """Return what features describe."""
    found = features @ w["W_dec"] + w["b_dec"]
    return found if "W_skip" not in w else found + x @ w["W_skip"].T


def write_saelens(folder, architecture, w, /, hook="blocks.1.hook_resid_pre", hook_out=None, **more):
    """Write a dictionary as SAELens 6 does."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    is_transcoder = "transcoder" in architecture
    metadata = {"sae_lens_version": "6.12.1", "model_name": "tiny", "hook_name": hook, "hook_head_index": None}
    metadata |= {"model_class_name": "HookedTransformer", "prepend_bos": True}
    metadata |= {"model_from_pretrained_kwargs": {"center_writing_weights": False, "fold_ln": False}}
    metadata |= {"hook_name_out": hook_out} if hook_out else {}
    metadata |= more.pop("metadata", {})
    config = {
        "d_in": w["W_enc"].shape[0],
        "d_sae": w["W_enc"].shape[1],
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not is_transcoder,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
        "architecture": architecture,
    }
    config |= {"k": K, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}
    config |= {"d_out": w["W_dec"].shape[1]} if is_transcoder else {}
    (folder / "cfg.json").write_text(json.dumps(config | more))
    save_file({name: tensor.contiguous() for name, tensor in w.items()}, folder / "sae_weights.safetensors")
    return folder


def write_saelens_5(folder, w, **settings):
    """Write a dictionary as SAELens before version 6 did: everything side by side, by older names."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": "standard",
        "d_in": w["W_enc"].shape[0],
        "d_sae": w["W_enc"].shape[1],
        "activation_fn_str": "relu",
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False,
        "context_size": 128,
        "model_name": "tiny",
        "hook_name": "blocks.1.hook_resid_pre",
        "hook_layer": 1,
        "hook_head_index": None,
        "prepend_bos": True,
        "dataset_path": "none",
        "normalize_activations": "none",
        "dtype": "torch.float32",
        "model_from_pretrained_kwargs": {"center_writing_weights": False},
    }
    (folder / "cfg.json").write_text(json.dumps(config | settings))
    save_file(w, folder / "sae_weights.safetensors")
    return folder


def write_sparsify(folder, w, **settings):
    """Write a top-k coder as EleutherAI's sparsify does; the encoder lies as in ``nn.Linear``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"activation": "topk", "expansion_factor": 32, "num_latents": 0, "k": K, "d_in": w["W_enc"].shape[0]}
    config |= {"multi_topk": False, "skip_connection": "W_skip" in w, "normalize_decoder": True}
    (folder / "cfg.json").write_text(json.dumps(config | settings))
    named = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"], "W_dec": w["W_dec"]}
    save_file(named | {name: w[name] for name in ("b_dec", "W_skip") if name in w}, folder / "sae.safetensors")
    return folder


def write_traced(folder, layers, **settings):
    """Write transcoders of several layers as circuit-tracer does; the encoder lies as (feature, width)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_name": "tiny", "model_kind": "transcoder_set", "feature_input_hook": "mlp.hook_in"}
    config |= {"feature_output_hook": "hook_mlp_out"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | settings))
    for layer, w in layers.items():
        named = {name: tensor for name, tensor in w.items() if name not in ("W_enc", "threshold")}
        named["W_enc"] = w["W_enc"].T.contiguous()
        if "threshold" in w:
            named["activation_function.threshold"] = w["threshold"]
        save_file(named, folder / f"layer_{layer}.safetensors")
    return folder


def write_scope(folder, w):
    """Write a JumpReLU dictionary as Gemma Scope does: arrays and nothing else."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in w.items()})
    return folder


class Coder(nn.Module):
    """A dictionary of one's own, with ``encode`` and ``decode``."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.ParameterDict(w)

    def encode(self, x):
        return encoded("standard", self.w, x)

    def decode(self, features):
        return decoded(self.w, features)
