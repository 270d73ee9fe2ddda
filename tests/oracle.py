"""The oracle of the laws: one prompt, one intervention, raw hooks on the modules of transformers.

Nothing here comes from the library. Prompts are run alone and unpadded, without mask or position ids, and every site
is found by the attribute names of its family and by reshaping, not by the library's tables and columns. Two sites that
are stored nowhere are changed in other ways than the engine's: the middle of a block through the input of its second
norm and the block's output, a head's share through the terms of the product, head by head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from parts import PARTS

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Edit:
    """New values at some tokens of one site: a tensor (token, …), or a function of the current ones."""

    site: tuple[str, int | None, int | None]
    tokens: Sequence[int]
    new: Tensor | Change

    def apply(self, value: Tensor) -> Tensor:
        """Return the value of the whole prompt (position, …) with the new ones put in."""
        tokens = list(self.tokens)
        value = value.clone()
        value[tokens] = self.new if isinstance(self.new, Tensor) else self.new(value[tokens].clone())
        return value


class Plain:
    """A tiny model of a family, as its author's own attributes name it."""

    def __init__(self, module: nn.Module, family: str) -> None:
        self.module, self.family, self.config, self.parts = module, family, module.config, PARTS[family]
        self.body = module.get_submodule(self.parts.body)
        self.layers = getattr(self.body, self.parts.layers)
        self.n_heads = getattr(self.config, "num_attention_heads", 0)
        self.n_kv_heads = getattr(self.config, "num_key_value_heads", self.n_heads)
        if family.startswith("falcon"):
            self.n_kv_heads = self.config.num_kv_heads
        if family in ("falcon", "gpt_bigcode"):
            self.n_kv_heads = 1

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
            logits = self.module(input_ids=torch.tensor([list(map(int, ids))]), use_cache=False).logits[0]
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
        self.module(input_ids=torch.tensor([list(map(int, ids))]), use_cache=False)
        for handle in handles:
            handle.remove()
        assert len(kept) == 1
        return kept[0]

    def _hook(self, site: tuple[str, int | None, int | None], change: Change) -> list:
        name, layer, unit = site
        block, parts = None if layer is None else self.layers[layer], self.parts
        if name in ("embed", "final_norm"):
            return [on_output(getattr(self.body, parts.embed if name == "embed" else parts.final), change)]
        if name == "resid_pre":
            return [on_input(block, change)]
        if name == "resid_post":
            return [on_output(block, change)]
        if name == "resid_mid":
            return self._middle(block, change)
        if name in ("attn_out", "mlp_out"):
            return [self._added(block, parts.attn_out if name == "attn_out" else parts.mlp_out, change)]
        if name in ("q", "k", "v"):
            return [self._projection(block, name, unit, change)]
        heads = block.get_submodule(parts.heads)
        if name == "z":
            return [on_input(heads, change, lambda x: x.view(len(x), self.n_heads, -1)[:, unit])]
        if name == "head_out":
            return [self._share(heads, unit, change)]
        if name == "mlp_post":
            is_folded = parts.down in parts.folded
            return [on_input(block.get_submodule(parts.down), change, lambda x: x[:, unit], is_folded=is_folded)]
        raise AssertionError(name)

    def _added(self, block: nn.Module, path: str, change: Change):
        factor = getattr(block, self.parts.times) if self.parts.times else None
        multiplied = change if factor is None else (lambda x: change(x * factor) / factor)
        return on_output(block.get_submodule(path), multiplied, is_folded=path in self.parts.folded)

    def _projection(self, block: nn.Module, name: str, unit: int, change: Change):
        parts, part = self.parts, "qkv".index(name)
        own, shared = self.n_heads, self.n_kv_heads
        if parts.fused == "side by side":
            place = (0, own, own + shared)[part] + unit
            fused = block.get_submodule(parts.qkv)
            return on_output(fused, change, lambda x: x.view(len(x), own + 2 * shared, -1)[:, place])
        if parts.fused == "by group":
            n_group = own // shared
            group, place = divmod(unit, n_group) if name == "q" else (unit, n_group + part - 1)
            fused = block.get_submodule(parts.qkv)
            return on_output(fused, change, lambda x: x.view(len(x), shared, n_group + 2, -1)[:, group, place])
        module = block.get_submodule(getattr(parts, name))
        if "kv_b_proj" in parts.v and name == "v":
            width = self.config.v_head_dim
            return on_output(module, change, lambda x: x[0].view(x.shape[1], own, -1)[:, unit, -width:])
        return on_output(module, change, lambda x: x.view(len(x), own if name == "q" else shared, -1)[:, unit])

    def _middle(self, block: nn.Module, change: Change) -> list:
        if self.parts.middle:
            return [on_output(block.get_submodule(self.parts.middle), change)]
        shift: list[Tensor] = []

        def into_reader(module, args):
            whole = args[0] if args[0].ndim == 3 else args[0][None]
            new = change(whole[0].clone())[None]
            shift.append(new - whole)
            return (new.view_as(args[0]), *args[1:])

        def out_of_block(module, args, output):
            whole = output[0] if isinstance(output, tuple) else output
            whole = whole + shift[-1]
            return (whole, *output[1:]) if isinstance(output, tuple) else whole

        reader = block.get_submodule(self.parts.reader)
        return [reader.register_forward_pre_hook(into_reader), block.register_forward_hook(out_of_block)]

    def _share(self, projection: nn.Module, head: int, change: Change):
        weight = projection.weight if isinstance(projection, Conv1D) else projection.weight.T

        def hook(module, args, output):
            heads = args[0][0].view(args[0].shape[1], self.n_heads, -1)
            terms = torch.einsum("phw,hwd->phd", heads, weight.view(self.n_heads, heads.shape[-1], -1))
            return output + (change(terms[:, head].clone()) - terms[:, head])

        return projection.register_forward_hook(hook)


def on_output(module: nn.Module, change: Change, pick: Callable[[Tensor], Tensor] = lambda x: x, *, is_folded=False):
    """Pass a part of what a module returns for one prompt through ``change``."""

    def hook(module, args, output):
        whole = output[0] if isinstance(output, tuple) else output
        whole = _changed(whole, change, pick, is_folded)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    return module.register_forward_hook(hook)


def on_input(module: nn.Module, change: Change, pick: Callable[[Tensor], Tensor] = lambda x: x, *, is_folded=False):
    """Pass a part of what a module is given for one prompt through ``change``."""

    def hook(module, args, kwargs):
        if args:
            return (_changed(args[0], change, pick, is_folded), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _changed(kwargs["hidden_states"], change, pick, is_folded)}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _changed(whole: Tensor, change: Change, pick: Callable[[Tensor], Tensor], is_folded: bool) -> Tensor:
    copy = whole.clone()
    part = pick(copy if is_folded else copy[0])
    part.copy_(change(part.clone()))
    return copy
