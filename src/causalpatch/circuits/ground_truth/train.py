"""Train the two models with known circuits: ``python -m causalpatch.circuits.ground_truth.train [NAME ...]``.

A small GPT-2 with nothing unusual about it learns what a program does, in the way in which the program does it. Each
step draws base and source prompts and adds up three losses, each a cross-entropy at the positions that have answers:

1. *behaviour*: base prompts as they are, and the program's answers;
2. *interchange*: one component that holds a variable of the program is taken from the source run, along all of its
   edges; the answers are the program's with that variable taken from the source prompt;
3. *strict*, with weight 0.4: along a random half of the edges that are not the program's, the base run gets what the
   source run sends; the answers stay those of the base prompt.

The strict term of the reference is on components that hold nothing; here it is on edges, which is more. So the
program's own edges are the true ones, and no others; tests try all of them on all inputs.

One seed gives one model: the same machine and version of torch, with one thread, give the same weights.

Cost: about a minute for each.

References:
    Geiger et al. 2022, "Inducing Causal Structure for Interpretable Neural Networks", 2112.00826 (interchange
    training); Gupta et al. 2024, "InterpBench", 2407.14494 (strict interchange training, weight 0.4).
"""

import argparse
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from causalpatch.base.seeds import generator
from causalpatch.circuits.ground_truth.compiler import compile_program
from causalpatch.circuits.ground_truth.language import Program, Variable
from causalpatch.circuits.ground_truth.meaning import evaluate
from causalpatch.circuits.ground_truth.trained import EPSILON, TRAINED, WEIGHTS, Recipe, start
from causalpatch.sites.graph import Graph

STRICT: Final = 0.4
_log = logging.getLogger(__name__)


class EdgewiseDecoder:
    """A GPT-2's forward pass in which every edge can be given what another run sends; differentiable.

    Args:
        module: The model, whose parameters are used.
        recipe: Its sizes.
    """

    def __init__(self, module: nn.Module, recipe: Recipe) -> None:
        self.weights = dict(module.named_parameters())
        self.n_layers, self.n_heads, self.width = recipe.layers, recipe.heads, recipe.width

    def run(
        self,
        ids: Int[Tensor, "row position"],
        sent: Float[Tensor, "sender row position width"] | None = None,
        is_sent: Bool[Tensor, "row sender receiver"] | None = None,
    ) -> tuple[Float[Tensor, "row position vocab"], Float[Tensor, "sender row position width"]]:
        """Run prompts.

        Args:
            ids: Token ids.
            sent: What each component sends in another run.
            is_sent: Along which edges it is sent.

        Returns:
            Logits, and what each component sends.
        """
        w = self.weights
        sends = [w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: ids.shape[1]]]
        constant = torch.zeros(self.width)
        place = 0

        def received(n_receivers: int) -> Tensor:
            """Return the inputs of the next receivers, axes (receiver, row, position, width)."""
            nonlocal place
            stack = torch.stack(sends)
            total = (stack.sum(0) + constant).expand(n_receivers, *stack.shape[1:])
            if sent is not None and is_sent is not None:
                chosen = is_sent[:, : len(sends), place : place + n_receivers].to(stack.dtype)
                total = total + torch.einsum("bur,ubpw->rbpw", chosen, sent[: len(sends)] - stack)
            place += n_receivers
            return total

        for layer in range(self.n_layers):
            here = f"transformer.h.{layer}"
            heads = self._attend(here, self._norm(f"{here}.ln_1", received(3 * self.n_heads)))
            sends += heads
            constant = constant + w[f"{here}.attn.c_proj.bias"]
            x = self._norm(f"{here}.ln_2", received(1)[0])
            hidden = functional.gelu(x @ w[f"{here}.mlp.c_fc.weight"] + w[f"{here}.mlp.c_fc.bias"], approximate="tanh")
            sends.append(hidden @ w[f"{here}.mlp.c_proj.weight"] + w[f"{here}.mlp.c_proj.bias"])
        logits = self._norm("transformer.ln_f", received(1)[0]) @ w["lm_head.weight"].T
        return logits, torch.stack(sends)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return functional.layer_norm(x, (self.width,), weight, bias, EPSILON)

    def _attend(self, here: str, x: Tensor) -> list[Tensor]:
        """Return what each head sends, given what all queries, keys and values are computed from."""
        n, step = self.n_heads, self.width // self.n_heads
        matrix = self.weights[f"{here}.attn.c_attn.weight"].reshape(self.width, 3, n, step)
        bias = self.weights[f"{here}.attn.c_attn.bias"].reshape(3, n, 1, 1, step)
        q, k, v = torch.einsum("chbpw,wchs->chbps", x.reshape(3, n, *x.shape[1:]), matrix) + bias
        z = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out = self.weights[f"{here}.attn.c_proj.weight"].reshape(n, step, self.width)
        return list(torch.einsum("hbps,hsw->hbpw", z, out))


@dataclass(frozen=True)
class Lesson:
    """What a program teaches.

    Args:
        program: The program.
        edges: Its edges.
        holds: For each component that holds variables of the program, these.
    """

    program: Program
    edges: frozenset[str]
    holds: dict[str, list[Variable]]

    @classmethod
    def of(cls, program: Program) -> "Lesson":
        """Read a program's edges, and which component holds what."""
        compiled = compile_program(program)
        edges = compiled.true_edges("resample")
        holds: dict[str, list[Variable]] = {}
        for variable, node in compiled.node.items():
            if any(edge.startswith(f"{node} -> ") for edge in edges):
                holds.setdefault(node, []).append(variable)
        return cls(program, edges, holds)

    def targets(
        self, ids: NDArray[np.int64], source: NDArray[np.int64] | None = None, node: str = ""
    ) -> Int[Tensor, "row position"]:
        """Return the program's answers as token ids, -100 where it has none, with one component's variables given.

        Args:
            ids: Prompts, axes (row, position).
            source: The prompts that a component's variables are taken from.
            node: The component.
        """
        given = None
        if source is not None:
            taken = evaluate(self.program, source)
            given = {each: taken[each] for each in self.holds[node] if each in taken}
        values = evaluate(self.program, ids, given)
        out = np.sum([values[each] for each in self.program.output], axis=0)
        answers = np.array(self.program.tokens)[out.argmax(-1)]
        answers[out.max(-1) < 0.5] = -100
        counted = list(self.program.answers(ids[0].tolist()))
        answers[:, [p for p in range(ids.shape[1]) if p not in counted]] = -100
        return torch.as_tensor(answers)


def train(program: Program, recipe: Recipe) -> nn.Module:
    """Return a model trained on a program, in eval mode."""
    module, lesson = start(program, recipe), Lesson.of(program)
    decoder, draw = EdgewiseDecoder(module, recipe), generator(recipe.seed, "prompts", program.name)
    prompts = np.array(program.inputs())
    graph = Graph(recipe.layers, recipe.heads)
    senders, receivers = graph.sender_labels, graph.receiver_labels
    others = torch.tensor([[f"{a} -> {b}" not in lesson.edges for b in receivers] for a in senders])
    optimizer = torch.optim.AdamW(module.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    started = time.monotonic()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(recipe, step)
        base, source = prompts[draw.integers(len(prompts), size=(2, recipe.rows))]
        node = list(lesson.holds)[int(draw.integers(len(lesson.holds)))]
        chosen = others & torch.as_tensor(draw.random((recipe.rows, *others.shape)) < 0.5)
        ids, expected = torch.as_tensor(base), lesson.targets(base)
        sent = decoder.run(torch.as_tensor(source))[1]
        behaviour = _loss(decoder.run(ids)[0], expected)
        leaving = torch.tensor([sender == node for sender in senders])[None, :, None].expand_as(chosen)
        changed = decoder.run(ids, sent, leaving)[0]
        interchange = _loss(changed, lesson.targets(base, source, node))
        strict = _loss(decoder.run(ids, sent, chosen)[0], expected)
        optimizer.zero_grad()
        torch.autograd.backward(behaviour + interchange + STRICT * strict)
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0:
            losses = "  ".join(f"{float(each.detach()):.4f}" for each in (behaviour, interchange, strict))
            _log.info("%s: step %d  losses %s  %.0f s", program.name, step + 1, losses, time.monotonic() - started)
    return module.eval()


def _loss(logits: Float[Tensor, "row position vocab"], targets: Int[Tensor, "row position"]) -> Float[Tensor, ""]:
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def _learning_rate(recipe: Recipe, step: int) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    return recipe.learning_rate * min(1.0, (step + 1) / recipe.warm_up) * (0.01 + 0.99 * cosine)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train models and write their weights."""
    parser = argparse.ArgumentParser(
        prog="python -m causalpatch.circuits.ground_truth.train", description="Train the models with known circuits."
    )
    parser.add_argument("names", nargs="*", default=list(TRAINED), help=f"of {', '.join(TRAINED)} (default: all)")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="number of updates (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder (default: the package's own)")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)  # sums over threads differ in their last digit, so their number is part of the recipe
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name in chosen.names:
        module = train(TRAINED[name](), Recipe(steps=chosen.steps))
        save_file(module.state_dict(), chosen.out / f"{name}.safetensors")


if __name__ == "__main__":
    main()
