"""The oracle of the laws: one prompt, one intervention, raw hooks on the modules of transformers.

Nothing here comes from the library; attention is computed by a kernel of its own where something inside it is read or
changed. Prompts are run alone and unpadded, without mask or position ids, and every site
is found by the attribute names of its family and by reshaping, not by the library's tables and columns. Two sites that
are stored nowhere are changed in other ways than the engine's: the middle of a block through the input of its second
norm and the block's output, a head's share through the terms of the product, head by head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.pytorch_utils import Conv1D

Change = Callable[[Tensor], Tensor]
SECOND_NORM = {"gpt2": "ln_2", "gemma2": "pre_feedforward_layernorm"}


@dataclass(frozen=True)
class Edit:
    """New values at some tokens of one site: a tensor (token, …), or a function of the current ones.

    Values for each key are those of a prompt's ``n_keys`` tokens; answers that are spelt out behind them have keys too.
    """

    site: tuple[str, int | None, int | None]
    tokens: Sequence[int]
    new: Tensor | Change
    n_keys: int | None = None

    def apply(self, value: Tensor) -> Tensor:
        """Return the value of the whole prompt (position, …) with the new ones put in."""
        tokens = list(self.tokens)
        value = value.clone()
        part = value if self.n_keys is None else value[..., : self.n_keys]
        part[tokens] = self.new if isinstance(self.new, Tensor) else self.new(part[tokens].clone())
        return value


@dataclass
class Inside:
    """What is changed inside attention: (attention module, site's name, unit, change), in order."""

    steps: list[tuple[nn.Module, str, int, Change]] = field(default_factory=list)

    def add(self, *step):
        self.steps.append(step)
        return self

    def remove(self):
        self.steps.clear()

    def change(self, module: nn.Module, name: str, heads: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return heads (row, head, position, …) of one prompt with what is changed there; hidden keys stay."""
        heads = heads.clone()
        for where, what, unit, change in self.steps:
            if where is module and what == name:
                row = heads[0, unit]
                hidden = {"scores": -torch.inf, "pattern": 0.0}.get(name)
                given = row.clone() if hidden is None else torch.where(visible, row, hidden)
                new = change(given)
                heads[0, unit] = new if hidden is None else torch.where(visible, new, row)
        return heads

    def attend(self, module, query, key, value, mask, scaling=None, softcap=None, **_):
        """Compute attention head by head, in the dtype of the model."""
        query, key = self.change(module, "q_rot", query), self.change(module, "k_rot", key)
        shared = query.shape[1] // key.shape[1]
        visible = mask[0, 0] == 0
        of_heads = [query[:, h] @ key[:, h // shared].mT for h in range(query.shape[1])]
        scores = torch.stack(of_heads, 1) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        scores = scores if softcap is None else softcap * (scores / softcap).tanh()
        scores = self.change(module, "scores", scores.masked_fill(~visible, -torch.inf), visible)
        pattern = self.change(module, "pattern", scores.softmax(-1), visible)
        mixed = [pattern[:, h] @ value[:, h // shared] for h in range(query.shape[1])]
        return torch.stack(mixed, 2), pattern


class Plain:
    """A tiny model of a family, as its author's own attributes name it."""

    def __init__(self, module: nn.Module, family: str) -> None:
        self.module, self.family, self.config = module, family, module.config
        body = {"gpt2": "transformer", "gpt_neox": "gpt_neox", "gpt_neox_sequential": "gpt_neox"}.get(family, "model")
        self.body = getattr(module, body)
        self.layers = self.body.h if family == "gpt2" else self.body.layers
        self.inside = Inside()
        self.n_heads = self.config.num_attention_heads
        self.n_kv_heads = getattr(self.config, "num_key_value_heads", self.n_heads)

    @torch.no_grad()
    def logits(self, ids: Sequence[int], edits: Sequence[Edit] = ()) -> Tensor:
        """Return the logits (position, vocab) of one prompt with edits made in order."""
        # A block's second norm comes before its end, whichever edit was named first.
        handles = [
            handle
            for edit in sorted(edits, key=lambda edit: edit.site[0] != "resid_mid")
            for handle in ([] if edit.site[0] == "logits" else self._hook(edit.site, edit.apply))
        ]
        try:
            logits = self._run(ids)
        finally:
            for handle in handles:
                handle.remove()
        for edit in edits:
            if edit.site[0] == "logits":
                logits = edit.apply(logits)
        return logits

    @torch.no_grad()
    def value(self, ids: Sequence[int], site: tuple[str, int | None, int | None]) -> Tensor:
        """Return the value (position, …) of a site in an untouched run of one prompt."""
        if site[0] == "logits":
            return self.logits(ids)
        kept: list[Tensor] = []

        def keep(value: Tensor) -> Tensor:
            kept.append(value.clone())
            return value

        handles = self._hook(site, keep)
        self._run(ids)
        for handle in handles:
            handle.remove()
        assert len(kept) == 1
        return kept[0]

    def _run(self, ids: Sequence[int]) -> Tensor:
        before = self.config._attn_implementation
        if self.inside.steps:
            AttentionInterface.register("oracle", self.inside.attend)
            AttentionMaskInterface.register("oracle", eager_mask)
            self.config._attn_implementation = "oracle"
        try:
            return self.module(input_ids=torch.tensor([list(map(int, ids))]), use_cache=False).logits[0]
        finally:
            self.config._attn_implementation = before

    def _hook(self, site: tuple[str, int | None, int | None], change: Change) -> list:
        name, layer, unit = site
        block = None if layer is None else self.layers[layer]
        if name in ("q_rot", "k_rot", "scores", "pattern"):
            return [self.inside.add(self._attention(block), name, unit, change)]
        if name.endswith("_bias"):
            return [self._bias(block, name, unit, change)]
        if name == "pos_embed":
            return [on_output(self.body.wpe, change)]
        if name in ("embed", "final_norm"):
            end = {"gpt2": ("wte", "ln_f"), "gpt_neox": ("embed_in", "final_layer_norm")}
            end["gpt_neox_sequential"] = end["gpt_neox"]
            return [
                on_output(getattr(self.body, end.get(self.family, ("embed_tokens", "norm"))[name != "embed"]), change)
            ]
        if name == "resid_pre":
            return [on_input(block, change)]
        if name == "resid_post":
            return [on_output(block, change)]
        if name == "resid_mid":
            return self._middle(block, change)
        if name in ("attn_out", "mlp_out"):
            return [on_output(self._sublayer(block, name), change)]
        if name in ("q", "k", "v"):
            return [self._projection(block, name, unit, change)]
        attention = self._attention(block)
        if name == "z":
            heads = self._heads(attention)
            return [on_input(heads, change, lambda x: x.view(len(x), self.n_heads, -1)[:, unit])]
        if name == "head_out":
            return [self._share(self._heads(attention), unit, change)]
        if name == "mlp_post":
            down = {"gpt2": "c_proj"}.get(self.family, "dense_4h_to_h" if "neox" in self.family else "down_proj")
            return [on_input(getattr(block.mlp, down), change, lambda x: x[:, unit])]
        if name in ("mlp_pre", "mlp_gate"):
            up = {"gpt2": "c_fc"}.get(self.family, "dense_h_to_4h" if "neox" in self.family else "up_proj")
            up = getattr(block.mlp, "gate_proj" if name == "mlp_gate" else up)
            return [on_output(up, change, lambda x: x[:, unit])]
        raise AssertionError(name)

    def _bias(self, block: nn.Module, name: str, unit: int | None, change: Change):
        attention = self._attention(block)
        neox, part = "neox" in self.family, "qkv".find(name[0])
        if name == "attn_bias":
            projection = self._heads(attention)
        elif name == "mlp_bias":
            projection = block.mlp.c_proj if self.family == "gpt2" else block.mlp.dense_4h_to_h
        elif self.family == "gpt2":
            projection = attention.c_attn
        else:
            projection = attention.query_key_value if neox else getattr(attention, f"{name[0]}_proj")

        def units(x):  # (…, column) to the columns of the unit
            if unit is None:
                return x
            heads = self.n_heads if name[0] == "q" else self.n_kv_heads
            shape = (3, heads, -1) if self.family == "gpt2" else (heads, 3, -1) if neox else (heads, -1)
            place = (part, unit) if self.family == "gpt2" else (unit, part) if neox else (unit,)
            return x.view(*x.shape[:-1], *shape)[(..., *place, slice(None))]

        def hook(module, args, output):
            output = output.clone()
            bias = units(module.bias).detach()
            term = bias.expand(output.shape[1], len(bias)).clone()
            units(output)[0] += change(term) - bias
            return output

        return projection.register_forward_hook(hook)

    def _attention(self, block: nn.Module) -> nn.Module:
        name = {"gpt2": "attn"}.get(self.family, "attention" if "neox" in self.family else "self_attn")
        return getattr(block, name)

    def _heads(self, attention: nn.Module) -> nn.Module:
        return getattr(attention, {"gpt2": "c_proj"}.get(self.family, "dense" if "neox" in self.family else "o_proj"))

    def _sublayer(self, block: nn.Module, name: str) -> nn.Module:
        if self.family == "gemma2":
            return block.post_attention_layernorm if name == "attn_out" else block.post_feedforward_layernorm
        return self._attention(block) if name == "attn_out" else block.mlp

    def _projection(self, block: nn.Module, name: str, unit: int, change: Change):
        part = "qkv".index(name)
        attention = self._attention(block)
        if self.family == "gpt2":
            return on_output(attention.c_attn, change, lambda x: x.view(len(x), 3, self.n_heads, -1)[:, part, unit])
        if "neox" in self.family:
            fused = attention.query_key_value
            return on_output(fused, change, lambda x: x.view(len(x), self.n_heads, 3, -1)[:, unit, part])
        heads = self.n_heads if name == "q" else self.n_kv_heads
        return on_output(getattr(attention, f"{name}_proj"), change, lambda x: x.view(len(x), heads, -1)[:, unit])

    def _middle(self, block: nn.Module, change: Change) -> list:
        norm = getattr(block, SECOND_NORM.get(self.family, "post_attention_layernorm"))
        shift: list[Tensor] = []

        def into_norm(module, args):
            new = change(args[0][0].clone())[None]
            shift.append(new - args[0])
            return (new, *args[1:])

        def out_of_block(module, args, output):
            whole = output[0] if isinstance(output, tuple) else output
            whole = whole + shift[-1]
            return (whole, *output[1:]) if isinstance(output, tuple) else whole

        return [norm.register_forward_pre_hook(into_norm), block.register_forward_hook(out_of_block)]

    def _share(self, projection: nn.Module, head: int, change: Change):
        weight = projection.weight if isinstance(projection, Conv1D) else projection.weight.T

        def hook(module, args, output):
            heads = args[0][0].view(args[0].shape[1], self.n_heads, -1)
            terms = torch.einsum("phw,hwd->phd", heads, weight.view(self.n_heads, heads.shape[-1], -1))
            return output + (change(terms[:, head].clone()) - terms[:, head])

        return projection.register_forward_hook(hook)


def on_output(module: nn.Module, change: Change, pick: Callable[[Tensor], Tensor] = lambda x: x):
    """Pass a part of what a module returns for one prompt through ``change``."""

    def hook(module, args, output):
        whole = output[0] if isinstance(output, tuple) else output
        whole = _changed(whole, change, pick)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    return module.register_forward_hook(hook)


def on_input(module: nn.Module, change: Change, pick: Callable[[Tensor], Tensor] = lambda x: x):
    """Pass a part of what a module is given for one prompt through ``change``."""

    def hook(module, args, kwargs):
        if args:
            return (_changed(args[0], change, pick), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _changed(kwargs["hidden_states"], change, pick)}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _changed(whole: Tensor, change: Change, pick: Callable[[Tensor], Tensor]) -> Tensor:
    copy = whole.clone()
    part = pick(copy[0])
    part.copy_(change(part.clone()))
    return copy
