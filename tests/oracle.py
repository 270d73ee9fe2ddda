"""The oracle of the laws: one prompt, one intervention, raw hooks on the modules of transformers.

Nothing here comes from the library; attention is computed by a kernel of its own where something inside it is read or
changed. Prompts are run alone and unpadded, without mask or position ids, and every site
is found by the attribute names of its family and by reshaping, not by the library's tables and columns. Two sites that
are stored nowhere are changed in other ways than the engine's: the middle of a block through the input of its second
norm and the block's output, a head's share through the terms of the product, head by head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.pytorch_utils import Conv1D

from parts import PARTS

Change = Callable[[Tensor], Tensor]


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

    def attend(self, module, query, key, value, mask, scaling=None, softcap=None, s_aux=None, **_):
        """Compute attention head by head, in the dtype of the model; a sink adds to what weights are divided by."""
        query, key = self.change(module, "q_rot", query), self.change(module, "k_rot", key)
        shared = query.shape[1] // key.shape[1]
        visible = torch.ones(query.shape[2], key.shape[2]).bool() if mask is None else mask[0, 0] == 0
        of_heads = [query[:, h] @ key[:, h // shared].mT for h in range(query.shape[1])]
        scores = torch.stack(of_heads, 1) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        scores = scores if softcap is None else softcap * (scores / softcap).tanh()
        scores = self.change(module, "scores", scores.masked_fill(~visible, -torch.inf), visible)
        total = scores.logsumexp(-1, keepdim=True)
        total = total if s_aux is None else torch.logaddexp(total, s_aux.reshape(1, -1, 1, 1))
        pattern = self.change(module, "pattern", (scores - total).exp(), visible)
        mixed = [pattern[:, h] @ value[:, h // shared] for h in range(query.shape[1])]
        return torch.stack(mixed, 2), pattern

    @contextmanager
    def spelt_out(self) -> Iterator[None]:
        """Change what torch's softmax is given and gives in modules that call it by themselves."""
        plain, running = functional.softmax, []

        def softmax(scores, *args, **kwargs):
            if not running:
                return plain(scores, *args, **kwargs)
            module = running.pop()  # a mode of torch's calls what goes by this name once more
            visible = scores[0, 0] > torch.finfo(scores.dtype).min / 2
            scores = self.change(module, "scores", scores, visible)
            return self.change(module, "pattern", plain(scores, *args, **kwargs), visible)

        handles = []
        for module in {step[0] for step in self.steps}:
            handles.append(module.register_forward_pre_hook(lambda module, _: running.append(module)))
            handles.append(module.register_forward_hook(lambda *_: running.clear()))
        functional.softmax = softmax
        try:
            yield
        finally:
            functional.softmax = plain
            for handle in handles:
                handle.remove()


class Plain:
    """A tiny model of a family, as its author's own attributes name it."""

    def __init__(self, module: nn.Module, family: str) -> None:
        self.module, self.family, self.config, self.parts = module, family, module.config, PARTS[family]
        self.body = module.get_submodule(self.parts.body)
        self.layers = self.body.get_submodule(self.parts.layers)
        self.inside = Inside()
        self.n_heads = getattr(self.config, "num_attention_heads", 0)
        self.n_kv_heads = getattr(self.config, "num_key_value_heads", self.n_heads)
        if family.startswith("falcon"):
            self.n_kv_heads = self.config.num_kv_heads
        if family in ("falcon", "gpt_bigcode"):
            self.n_kv_heads = 1

    @torch.no_grad()
    def logits(self, ids: Sequence[int], edits: Sequence[Edit] = ()) -> Tensor:
        """Return the logits (position, vocab) of one prompt with edits made in order."""
        # A block's second norm comes before its end, whichever edit was named first. Edits of one site share a hook:
        # those that change a sum by a difference must see what was written before.
        by_site: dict[tuple, list[Edit]] = {}
        for edit in sorted(edits, key=lambda edit: edit.site[0] != "resid_mid"):
            by_site.setdefault(edit.site, []).append(edit)
        handles = [
            handle
            for site, own in by_site.items()
            for handle in ([] if site[0] == "logits" else self._hook(site, partial(_in_order, own)))
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
        assert len(kept) == 1, f"{site} was met {len(kept)} times"
        return kept[0]

    def _run(self, ids: Sequence[int]) -> Tensor:
        before = self.config._attn_implementation
        is_spelt_out = self.parts.spelt_out and self.inside.steps
        if self.inside.steps and not is_spelt_out:
            AttentionInterface.register("oracle", self.inside.attend)
            AttentionMaskInterface.register("oracle", eager_mask)
            self.config._attn_implementation = "oracle"
        try:
            with self.inside.spelt_out() if is_spelt_out else nullcontext():
                return self._call(ids)
        finally:
            self.config._attn_implementation = before

    def _call(self, ids: Sequence[int]) -> Tensor:
        return self.module(input_ids=torch.tensor([list(map(int, ids))]), use_cache=False).logits[0]

    def _hook(self, site: tuple[str, int | None, int | None], change: Change) -> list:
        name, layer, unit = site
        block, parts = None if layer is None else self.layers[layer], self.parts
        if name in ("q_rot", "k_rot", "scores", "pattern"):
            return [self.inside.add(block.get_submodule(parts.attention), name, unit, change)]
        if name.endswith("_bias"):
            return [self._bias(block, name, unit, change)]
        if name == "pos_embed":
            return [on_output(self.body.get_submodule(parts.positions), change)]
        if name in ("embed", "final_norm"):
            return [on_output(self.body.get_submodule(parts.embed if name == "embed" else parts.final), change)]
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
        if name == "router":
            return [block.get_submodule(parts.experts).register_forward_pre_hook(partial(_reroute, change))]
        if name == "expert_out":
            return [block.get_submodule(parts.experts).register_forward_hook(partial(_on_expert, unit, change))]
        heads = block.get_submodule(parts.heads)
        if name == "z":
            return [on_input(heads, change, lambda x: x.view(len(x), self.n_heads, -1)[:, unit])]
        if name == "head_out":
            return [self._share(heads, unit, change)]
        if name == "mlp_post":
            is_folded = parts.down in parts.folded
            return [on_input(block.get_submodule(parts.down), change, lambda x: x[:, unit], is_folded=is_folded)]
        if name in ("mlp_pre", "mlp_gate"):
            return [self._up(block, name, unit, change)]
        raise AssertionError(name)

    def _up(self, block: nn.Module, name: str, neuron: int, change: Change):
        parts = self.parts
        if parts.gate_up:
            half = 1 if name == "mlp_pre" else 0
            return on_output(
                block.get_submodule(parts.gate_up), change, lambda x: x.view(len(x), 2, -1)[:, half, neuron]
            )
        path = parts.up if name == "mlp_pre" else parts.gate
        return on_output(block.get_submodule(path), change, lambda x: x[:, neuron], is_folded=path in parts.folded)

    def _bias(self, block: nn.Module, name: str, unit: int | None, change: Change):
        what = name.removesuffix("_bias")
        path, pick = {"attn": self.parts.heads, "mlp": self.parts.down}.get(what, ""), lambda x: x
        if what in ("q", "k", "v"):
            path, pick = self._place(what, unit)

        def hook(module, args, output):
            output = output.clone()
            whole = output.view(-1, output.shape[-1])  # one prompt's tokens
            bias = pick(module.bias.detach()[None])[0]
            pick(whole).add_(change(bias.expand(len(whole), len(bias)).clone()) - bias)
            return output

        return block.get_submodule(path).register_forward_hook(hook)

    def _added(self, block: nn.Module, path: str, change: Change):
        factor = getattr(block, self.parts.times) if self.parts.times else None
        multiplied = change if factor is None else (lambda x: change(x * factor) / factor)
        return on_output(block.get_submodule(path), multiplied, is_folded=path in self.parts.folded)

    def _projection(self, block: nn.Module, name: str, unit: int, change: Change):
        path, pick = self._place(name, unit)
        # Latent attention projects values for all tokens with an axis between rows and positions.
        return on_output(block.get_submodule(path), change, lambda x: pick(x.view(-1, x.shape[-1])))

    def _place(self, name: str, unit: int) -> tuple[str, Callable[[Tensor], Tensor]]:
        """Return a projection, and what picks the unit's columns from (token, column)."""
        parts, part = self.parts, "qkv".index(name)
        own, shared = self.n_heads, self.n_kv_heads
        if parts.fused == "side by side":
            place = (0, own, own + shared)[part] + unit
            return parts.qkv, lambda x: x.view(len(x), own + 2 * shared, -1)[:, place]
        if parts.fused == "by group":
            n_group = own // shared
            group, place = divmod(unit, n_group) if name == "q" else (unit, n_group + part - 1)
            return parts.qkv, lambda x: x.view(len(x), shared, n_group + 2, -1)[:, group, place]
        if "kv_b_proj" in parts.v and name == "v":
            return parts.v, lambda x: x.view(len(x), own, -1)[:, unit, -self.config.v_head_dim :]
        return getattr(parts, name), lambda x: x.view(len(x), own if name == "q" else shared, -1)[:, unit]

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


def _in_order(edits: Sequence[Edit], value: Tensor) -> Tensor:
    for edit in edits:
        value = edit.apply(value)
    return value


def _reroute(change: Change, module: nn.Module, args: tuple):
    """Give every token all experts, with weights that were changed."""
    weights = change(_weights_of_all(module, args))
    every = torch.arange(weights.shape[1]).expand(len(weights), -1)
    return args[0], every.contiguous(), weights


def _on_expert(unit: int, change: Change, module: nn.Module, args: tuple, output: Tensor):
    """Change the term of one expert, which is computed by hand."""
    term = _weights_of_all(module, args)[:, unit, None] * _expert(module, unit, args[0])
    return output + (change(term.clone()) - term)


def _weights_of_all(module: nn.Module, args: tuple) -> Tensor:
    """Return the weights of all experts (token, expert) that the experts of one prompt's tokens are called with."""
    tokens, numbers, chosen = args
    weights = tokens.new_zeros(len(tokens), len(module.down_proj))
    for token, (experts, own) in enumerate(zip(numbers.tolist(), chosen, strict=True)):
        for place, expert in enumerate(experts):
            weights[token, expert] = own[place]
    return weights


def _expert(module: nn.Module, number: int, tokens: Tensor) -> Tensor:
    into, out = module.gate_up_proj[number].detach(), module.down_proj[number].detach()
    if hasattr(module, "down_proj_bias"):  # gpt-oss: columns by turns, clamped, a gate of its own
        made = tokens @ into + module.gate_up_proj_bias[number].detach()
        gate, up = made[:, ::2].clamp(max=module.limit), made[:, 1::2].clamp(-module.limit, module.limit)
        return ((up + 1) * gate / (1 + (-module.alpha * gate).exp())) @ out + module.down_proj_bias[number].detach()
    gate, up = (tokens @ into.T).chunk(2, -1)
    return (gate / (1 + (-gate).exp()) * up) @ out.T


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
