"""Edges by hand: one prompt, raw hooks, each input of each head assembled by itself, and autograd through it all.

Every input of a head has a copy of the stream of its own, in which each sender's part can be moved; the projection is
called once for each head, and its columns are put together again. Heads that share keys are given keys of their own by
repeating the weights of the model. Nothing comes from the library but the order of senders and receivers, which is
that of its graph's docstring: embedding, then heads and MLP layer by layer; q, k, v of all heads and the MLP, at last
the logits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from causalpatch.testing.tiny import tiny_model
from parts import PARTS

FIRST_NORM = {"gpt2": "ln_1", "llama": "input_layernorm", "gemma2": "input_layernorm", "gpt_neox": "input_layernorm"}
FIRST_NORM |= {"qwen3": "input_layernorm", "olmo2": "", "granite": "input_layernorm", "phi": "input_layernorm"}
FIRST_NORM |= {"opt": "self_attn_layer_norm"}
PARALLEL = ("gpt_neox", "phi")

Assemble = Callable[[int, Tensor], Tensor]  # a receiver and the stream, to what it reads instead


def ungrouped(family: str, heads: int = 4, kv_heads: int = 2, **more) -> nn.Module:
    """Return a tiny model without shared keys that computes what its twin with shared ones does."""
    shared = tiny_model(family, heads=heads, kv_heads=kv_heads, **more)
    own = tiny_model(family, heads=heads, kv_heads=heads, **more)
    state = shared.state_dict()
    for name, held in state.items():
        if (".k_proj." in name or ".v_proj." in name) and kv_heads < heads:
            width = held.shape[0] // kv_heads
            state[name] = held.unflatten(0, (kv_heads, width)).repeat_interleave(heads // kv_heads, 0).flatten(0, 1)
    own.load_state_dict(state)
    return own


@dataclass
class Run:
    """What one run gave: logits (position, vocab), the stream into layer 0, and z and the MLP's output by layer."""

    logits: Tensor
    embed: Tensor
    z: list[Tensor]
    mlp: list[Tensor]


class EdgePlain:
    """A tiny model whose heads share no keys, taken apart by hand."""

    def __init__(self, module: nn.Module, family: str) -> None:
        self.module, self.family, self.parts = module, family, PARTS[family]
        self.body = module.get_submodule(self.parts.body)
        self.layers = self.body.get_submodule(self.parts.layers)
        self.n_heads, self.is_parallel = module.config.num_attention_heads, family in PARALLEL
        for parameter in module.parameters():
            parameter.requires_grad_(False)

    @property
    def n_senders(self) -> int:
        return 1 + len(self.layers) * (self.n_heads + 1)

    @property
    def n_receivers(self) -> int:
        return 1 + len(self.layers) * (3 * self.n_heads + 1)

    def heard(self, receiver: int) -> int:
        """Return how many senders stand before a receiver."""
        layer, place = divmod(receiver, 3 * self.n_heads + 1)
        before = 1 + layer * (self.n_heads + 1)
        return before + (self.n_heads if place == 3 * self.n_heads and not self.is_parallel else 0)

    def run(self, ids: Sequence[int], assemble: Assemble | None = None, embed: Tensor | None = None) -> Run:
        """Run a prompt; inputs of receivers are what ``assemble`` makes of the stream."""
        found = Run(torch.empty(0), torch.empty(0), [], [])
        self.current = found
        handles = [hook for layer in range(len(self.layers)) for hook in self._hooks(layer, found, assemble, embed)]
        if assemble is not None:
            final = self.body.get_submodule(self.parts.final)
            last = self.n_receivers - 1
            handles.append(final.register_forward_pre_hook(lambda _, args: (assemble(last, args[0]),)))
        try:
            found.logits = self.module(torch.tensor([list(ids)]), use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _hooks(self, layer: int, found: Run, assemble: Assemble | None, embed: Tensor | None):
        block, parts = self.layers[layer], self.parts
        stream: list[Tensor] = []

        def enter(_, args, kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            if layer == 0 and embed is not None:
                x = embed[None]
            if layer == 0:
                found.embed = x[0]
            stream.append(x)
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

        def keep_mlp(_, __, out):
            out = out[0] if isinstance(out, tuple) else out
            found.mlp.append(out.reshape(stream[0].shape)[0])

        yield block.register_forward_pre_hook(enter, with_kwargs=True)
        yield block.get_submodule(parts.heads).register_forward_pre_hook(lambda _, args: found.z.append(args[0][0]))
        yield block.get_submodule(parts.mlp_out).register_forward_hook(keep_mlp)
        if assemble is None:
            return
        for kind in range(3):
            path = parts.qkv or (parts.q, parts.k, parts.v)[kind]
            yield block.get_submodule(path).register_forward_hook(
                lambda module, _, out, kind=kind: self._project(module, out, kind, layer, stream[0], assemble)
            )
        receiver = (layer + 1) * (3 * self.n_heads + 1) - 1
        if self.family == "phi":  # one norm for both
            norm = block.get_submodule(FIRST_NORM[self.family])
            yield block.get_submodule("mlp").register_forward_pre_hook(
                lambda _, args: (norm.forward(assemble(receiver, stream[0])),)
            )
        else:
            reader = {"olmo2": "mlp"}.get(self.family, parts.reader)
            yield block.get_submodule(reader).register_forward_pre_hook(
                lambda _, args: (assemble(receiver, args[0].reshape(stream[0].shape)).reshape(args[0].shape),)
            )

    def _project(self, module, out, kind, layer, stream, assemble):
        """Return a projection's output with the columns of each head computed from a stream of its own."""
        norm, out = FIRST_NORM[self.family], out.clone()
        for head in range(self.n_heads):
            x = assemble(layer * (3 * self.n_heads + 1) + kind * self.n_heads + head, stream)
            x = self.layers[layer].get_submodule(norm).forward(x) if norm else x
            columns = self._columns(out.shape[-1], kind, head)
            out[..., columns] = module.forward(x)[..., columns]
        return out

    def _columns(self, total: int, kind: int, head: int) -> slice:
        fused = self.parts.fused
        width = total // self.n_heads // (3 if fused else 1)
        start = {"side by side": (kind * self.n_heads + head), "by group": 3 * head + kind, "": head}[fused]
        return slice(start * width, (start + 1) * width)

    def added(self, layer: int, z: Tensor) -> Tensor:
        """Return what attention adds to the stream, by what its heads hand to the output projection."""
        block, parts = self.layers[layer], self.parts
        out = block.get_submodule(parts.heads).forward(z)
        if "layernorm" in parts.attn_out:
            out = block.get_submodule(parts.attn_out).forward(out)
        return out * (getattr(block, parts.times) if parts.times else 1.0)

    def mlp_added(self, layer: int, out: Tensor) -> Tensor:
        return out * (getattr(self.layers[layer], self.parts.times) if self.parts.times else 1.0)

    def deltas(self, base: Run, source: Run, shares: Sequence[float] = (0.0,)) -> Tensor:
        """Return what each sender adds more in the source run, (sender, token, width).

        Behind a norm that is to first order: by its slope, a mean over shares of the way from base to source.
        """
        found = [source.embed - base.embed]
        for layer in range(len(self.layers)):
            z, dz = base.z[layer], source.z[layer] - base.z[layer]
            width = z.shape[-1] // self.n_heads
            for head in range(self.n_heads):
                only = torch.zeros_like(dz)
                only[:, head * width : (head + 1) * width] = dz[:, head * width : (head + 1) * width]
                moved = [
                    torch.autograd.functional.jvp(lambda z, n=layer: self.added(n, z), z + share * dz, only)[1]
                    for share in shares
                ]
                found.append(torch.stack(moved).mean(0))
            found.append(self.mlp_added(layer, source.mlp[layer] - base.mlp[layer]))
        return torch.stack(found).detach()

    def slopes(
        self, ids: Sequence[int], deltas: Tensor, measure, embed: Tensor | None = None, moved: Tensor | float = 0.0
    ) -> Tensor:
        """Return (sender, receiver, token): the slope of a metric in each sender's part of each receiver's stream.

        Parts of senders are moved by a share of their difference, ``moved`` (sender,), at all receivers alike.
        """
        start = torch.as_tensor(moved).to(deltas) * torch.ones(self.n_senders).to(deltas)
        mask = torch.zeros(self.n_senders, self.n_receivers, deltas.shape[1], dtype=deltas.dtype, requires_grad=True)

        def assemble(receiver: int, stream: Tensor) -> Tensor:
            n = self.heard(receiver)
            shares = start[:n, None, None] + mask[:n, receiver, :, None]
            return stream + (shares * deltas[:n]).sum(0)

        logits = self.run(ids, assemble, embed).logits
        (found,) = torch.autograd.grad(measure(logits), mask)
        return found

    @torch.no_grad()
    def patched(self, ids: Sequence[int], source: Run, mask: Tensor) -> Tensor:
        """Return the logits of a run in which some edges (sender, receiver) carry what the source run sends."""

        def assemble(receiver: int, stream: Tensor) -> Tensor:
            n, now = self.heard(receiver), self.current
            chosen = mask[:n, receiver].to(stream.dtype)
            total = stream + chosen[0] * (source.embed - now.embed)
            for layer in range(len(self.layers)):
                first = 1 + layer * (self.n_heads + 1)
                if first < n:
                    z = now.z[layer]
                    width = z.shape[-1] // self.n_heads
                    share = chosen[first : first + self.n_heads].repeat_interleave(width)
                    mixed = z + share * (source.z[layer] - z)
                    total = total + self.added(layer, mixed) - self.added(layer, z)
                if first + self.n_heads < n:
                    more = source.mlp[layer] - now.mlp[layer]
                    total = total + chosen[first + self.n_heads] * self.mlp_added(layer, more)
            return total

        return self.run(ids, assemble).logits
