"""Edges by hand in GPT-2's shape, with an input of its own for every head, as EAP-IG's code and auto-circuit have it.

Both make models that hand each head a copy of the stream for its queries, keys and values (TransformerLens'
``use_split_qkv_input``) and keep what every head adds (``use_attn_result``). Exact edges then take a forward each, in
which every input is put together from what all components before it send; scores of edges take the gradient at every
input, times the differences of all senders. This file does the same with plain torch on one module of transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from causalpatch.sites.graph import KINDS, Graph

Change = Callable[[slice, Tensor], Tensor]  # receivers and their inputs (pair, position, receiver, width), to new ones


@dataclass
class Sent:
    """What every sender gave in one run, ``(pair, position, width)``, in the order of the graph."""

    outputs: list[Tensor] = field(default_factory=list)

    def stacked(self) -> Tensor:
        """Return all, ``(sender, pair, position, width)``."""
        return torch.stack(self.outputs)


class Split:
    """GPT-2 with split inputs.

    Args:
        module: A ``GPT2LMHeadModel`` of transformers.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.body = module, module.transformer
        self.n_heads, self.width = module.config.n_head, module.config.n_embd
        self.graph = Graph(module.config.n_layer, self.n_heads)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the stream into the first layer."""
        return self.body.wte(ids) + self.body.wpe(torch.arange(ids.shape[1]))

    def run(self, stream: Tensor, change: Change | None = None, sent: Sent | None = None) -> Tensor:
        """Return the logits of the last position.

        Args:
            stream: The stream into the first layer.
            change: What inputs are changed to, given copies of the stream.
            sent: Takes what every sender gives.
        """
        change = change or (lambda receivers, inputs: inputs)
        sent = sent or Sent()
        sent.outputs.append(stream)
        for layer, block in enumerate(self.body.h):
            heads = self._heads(layer, block, stream, change)
            sent.outputs += heads.unbind(2)
            stream = stream + heads.sum(2) + block.attn.c_proj.bias
            place = self.graph.mlp_to(layer)
            given = change(slice(place, place + 1), stream[:, :, None])[:, :, 0]
            sent.outputs.append(block.mlp(block.ln_2(given)))
            stream = stream + sent.outputs[-1]
        last = change(slice(self.graph.logits, self.graph.logits + 1), stream[:, :, None])[:, :, 0]
        return self.module.lm_head(self.body.ln_f(last))[:, -1]

    def _heads(self, layer: int, block: nn.Module, stream: Tensor, change: Change) -> Tensor:
        """Return what every head adds, ``(pair, position, head, width)``."""
        copies = stream[:, :, None].expand(-1, -1, self.n_heads, -1)
        weight = block.attn.c_attn.weight.reshape(self.width, 3, self.n_heads, -1)
        bias = block.attn.c_attn.bias.reshape(3, self.n_heads, -1)
        parts = []
        for number, kind in enumerate(KINDS):
            given = block.ln_1(change(self.graph.heads_to(kind, layer), copies.clone()))
            parts.append(torch.einsum("bthd,dhe->bthe", given, weight[:, number]) + bias[number])
        query, key, value = (part.transpose(1, 2) for part in parts)
        z = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
        out = block.attn.c_proj.weight.reshape(self.n_heads, -1, self.width)
        return torch.einsum("bthe,hed->bthd", z, out)


@torch.no_grad()
def patched(split: Split, ids: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """Return logits of a forward in which edges carry what the source sends, all inputs put together.

    Args:
        split: The model.
        ids: The base prompts.
        source: What every sender gives in the source run, ``(sender, pair, position, width)``.
        mask: The edges, 1 or 0, ``(sender, receiver)``.
    """
    sent = Sent()

    def assemble(receivers: slice, inputs: Tensor) -> Tensor:
        n = int(split.graph.heard[receivers.start])
        moved = source[:n] - torch.stack(sent.outputs[:n])
        return inputs + torch.einsum("sr,sbtd->btrd", mask[:n, receivers], moved)

    return split.run(split.embed(ids), assemble, sent)


def scores(split: Split, base: Tensor, source: Tensor, read: Callable[[Tensor], Tensor], shares: list[float]) -> Tensor:
    """Return scores of all edges, ``(sender, receiver)``, means over pairs and points.

    Args:
        split: The model.
        base: Ids of the base prompts.
        source: Ids of the source prompts.
        read: The metric of each pair, from logits of the last position.
        shares: Points on the way of the embedding from the base's to the source's.
    """
    runs = []
    with torch.no_grad():
        for ids in (source, base):
            sent = Sent()
            split.run(split.embed(ids), sent=sent)
            runs.append(sent.stacked())
    moved = runs[0] - runs[1]
    found = torch.zeros(split.graph.shape)
    for share in shares:
        inputs: list[tuple[slice, Tensor]] = []

        def keep(receivers: slice, given: Tensor) -> Tensor:
            given = given if given.requires_grad else given.detach().requires_grad_()
            given.retain_grad()
            inputs.append((receivers, given))  # noqa: B023 - called within this turn alone
            return given

        read(split.run(runs[1][0] + share * moved[0], keep)).sum().backward()
        for receivers, given in inputs:
            n = int(split.graph.heard[receivers.start])
            found[:n, receivers] += torch.einsum("sbtd,btrd->sr", moved[:n], given.grad)
    return found / (len(base) * len(shares))
