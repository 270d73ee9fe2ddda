"""Encoder-decoders patched by hand: plain torch hooks on one prompt at a time, without padding or the library.

Where the parts of each kind of model stand is written down here once more, so that the tables of families are held
against something else.
"""

from contextlib import ExitStack

import torch

HALVES = {"t5": ("encoder", "decoder", "block"), "bart": ("model.encoder", "model.decoder", "layers")}


def kind_of(family):
    return "t5" if "t5" in family else "bart"


class ByHand:
    """A model run on one prompt for its encoder and one for its decoder."""

    def __init__(self, module, family):
        self.module, self.family, self.kind = module, family, kind_of(family)
        self.has_gate = family in ("t5_gated", "umt5")
        self.is_post = family in ("bart", "marian")

    def place(self, stream, name, layer):
        """Return the module and the side of a site, and whether its units lie side by side."""
        encoder, decoder, layers = HALVES[self.kind]
        half = encoder if stream == "encoder" else decoder
        if name in ("embed", "pos_embed", "final_norm", "logits"):
            final = "final_layer_norm" if self.kind == "t5" else "layer_norm"
            ends = {"embed": "embed_tokens", "pos_embed": "embed_positions", "final_norm": final}
            return ("lm_head" if name == "logits" else f"{half}.{ends[name]}"), "output", False
        at = f"{half}.{layers}.{layer}"
        if name in ("resid_pre", "resid_post"):
            return at, "input" if name == "resid_pre" else "output", False
        if self.kind == "t5":
            mlp = 1 if stream == "encoder" else 2
            attends = f"{at}.layer.1.EncDecAttention" if name.startswith("cross") else f"{at}.layer.0.SelfAttention"
            parts = {"q": "q", "k": "k", "v": "v", "z": "o", "attn_out": "o"}
            wi = ("wi_1", "wi_0") if self.has_gate else ("wi", "")
            inside = {"mlp_pre": wi[0], "mlp_gate": wi[1], "mlp_post": "wo"}
            if name == "resid_mid":
                return f"{at}.layer.{mlp}", "input", False
            if name == "mlp_out":
                return f"{at}.layer.{mlp}.DenseReluDense", "output", False
            if name in inside:
                path = f"{at}.layer.{mlp}.DenseReluDense.{inside[name]}"
                return path, "input" if name == "mlp_post" else "output", True
        else:
            attends = f"{at}.encoder_attn" if name.startswith("cross") else f"{at}.self_attn"
            parts = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "z": "out_proj", "attn_out": "out_proj"}
            inside = {"mlp_pre": ("fc1", "output"), "mlp_post": ("fc2", "input")}
            if name == "resid_mid":
                last = "self_attn_layer_norm" if stream == "encoder" else "encoder_attn_layer_norm"
                return (f"{at}.{last}", "output", False) if self.is_post else (f"{at}.final_layer_norm", "input", False)
            if name == "mlp_out":
                return f"{at}.fc2", "output", False
            if name in inside:
                return f"{at}.{inside[name][0]}", inside[name][1], True
        bare = name.removeprefix("cross_")
        return f"{attends}.{parts[bare]}", "input" if bare == "z" else "output", bare in "qkvz"

    def read_by_encoder(self, pair, role):
        """Return what the encoder is given on a side of a pair."""
        side = 0 if role == "clean" else 1
        return pair.beside["input_features"][side] if self.family == "whisper" else pair.encoder.input(role)

    def run(self, encoder, decoder, edits=(), reads=()):
        """Return the logits, and the tensors at the places that are read, all without the axis of rows.

        An edit is a place and a function from its tensor, positions first, to another.
        """
        found = {}
        with ExitStack() as hooks:
            for place, change in [*((p, c) for p, c in edits), *((p, None) for p in reads)]:
                path, side = place
                part = self.module.get_submodule(path)
                register = part.register_forward_pre_hook if side == "input" else part.register_forward_hook
                hooks.callback(register(_hook(place, side, change, found), **_with(side)).remove)
            with torch.no_grad():
                name = "input_features" if self.family == "whisper" else "input_ids"
                ids = {name: torch.tensor(encoder)[None], "decoder_input_ids": torch.tensor(decoder)[None]}
                logits = self.module(**ids, use_cache=False).logits[0]
        return logits, found


def _with(side):
    return {"with_kwargs": True} if side == "input" else {}


def _hook(place, side, change, found):
    def on_input(part, args, kwargs):
        if args:
            new = _see(place, args[0], change, found)
            return None if new is None else ((new, *args[1:]), kwargs)
        key = next(iter(kwargs))
        new = _see(place, kwargs[key], change, found)
        return None if new is None else (args, {**kwargs, key: new})

    def on_output(part, args, output):
        first = output[0] if isinstance(output, tuple) else output
        new = _see(place, first, change, found)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return on_input if side == "input" else on_output


def _see(place, tensor, change, found):
    # A learnt table of positions gives one row for all prompts where there is no axis of rows.
    if change is None:
        found[place] = tensor.clone().reshape(-1, tensor.shape[-1]) if tensor.ndim == 2 else tensor[0].clone()
        return None
    held = tensor.clone()
    return change(held[0])[None] if held.ndim == 3 else change(held)
