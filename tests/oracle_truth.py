"""The true edges of a small GPT-2 by trying every input: raw tensors of the checkpoint, nothing of the library.

One edge is replaced at a time. The input of one receiver is the sum of what all components sent, in which one sender's
term is that of another prompt (or zero); all that comes behind is computed again. An edge is true if that ever changes
the outputs.
"""

import itertools

import torch
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


class Small:
    """A ``GPT2LMHeadModel`` taken apart."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.weights = {name: value.detach() for name, value in module.state_dict().items()}
        self.n_layers, self.n_heads = module.config.n_layer, module.config.n_head
        self.width = module.config.n_embd
        self.epsilon = module.config.layer_norm_epsilon
        self.act = {"relu": torch.relu, "linear": lambda x: x, "gelu_new": gelu}[module.config.activation_function]

    def nodes(self) -> list[str]:
        inner = [
            [*(f"a{layer}.h{head}" for head in range(self.n_heads)), f"m{layer}"] for layer in range(self.n_layers)
        ]
        return ["embed", *itertools.chain(*inner)]

    def edges(self) -> list[str]:
        """Return all edges: from every component to every input of every later one."""
        found, seen = [], ["embed"]
        for layer in range(self.n_layers):
            heads = [f"a{layer}.h{head}" for head in range(self.n_heads)]
            found += [f"{sender} -> {head}<{kind}>" for sender in seen for head in heads for kind in "qkv"]
            seen += heads
            found += [f"{sender} -> m{layer}" for sender in seen]
            seen.append(f"m{layer}")
        return [*found, *(f"{sender} -> logits" for sender in seen)]

    def run(self, ids: Tensor, edge: str | None = None, sent: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits, and what each component sends ``[prompt, position, width]``; along one edge, ``sent``."""
        w = self.weights
        out = {"embed": w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: ids.shape[1]]}
        const = torch.zeros(self.width, dtype=out["embed"].dtype)

        def received(receiver: str, norm: str) -> Tensor:
            x = const + sum(out.values())
            if edge is not None and edge.partition(" -> ")[2] == receiver:
                x = x - out[edge.partition(" -> ")[0]] + sent
            x = x - x.mean(-1, keepdim=True)
            scale = torch.rsqrt((x * x).mean(-1, keepdim=True) + self.epsilon)
            return x * scale * w[f"{norm}.weight"] + w[f"{norm}.bias"]

        for layer in range(self.n_layers):
            here = f"transformer.h.{layer}"
            matrix, bias = w[f"{here}.attn.c_attn.weight"], w[f"{here}.attn.c_attn.bias"]
            step = self.width // self.n_heads
            written = {}
            for head in range(self.n_heads):
                q, k, v = (
                    received(f"a{layer}.h{head}<{kind}>", f"{here}.ln_1") @ matrix[:, at : at + step]
                    + bias[at : at + step]
                    for kind, at in zip("qkv", range(head * step, 3 * self.width, self.width), strict=False)
                )
                scores = q @ k.transpose(-1, -2) / step**0.5
                ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
                z = scores.masked_fill(ahead, -torch.inf).softmax(-1) @ v
                written[f"a{layer}.h{head}"] = z @ w[f"{here}.attn.c_proj.weight"][head * step : (head + 1) * step]
            out |= written
            const = const + w[f"{here}.attn.c_proj.bias"]
            x = received(f"m{layer}", f"{here}.ln_2")
            hidden = self.act(x @ w[f"{here}.mlp.c_fc.weight"] + w[f"{here}.mlp.c_fc.bias"])
            out[f"m{layer}"] = hidden @ w[f"{here}.mlp.c_proj.weight"] + w[f"{here}.mlp.c_proj.bias"]
        return received("logits", "transformer.ln_f") @ w["lm_head.weight"].T, out


def largest_changes(module, prompts, ablation: str, tokens, read=None, most=None, rows: int = 4096) -> dict[str, float]:
    """Return, for each edge, the largest change of any answer's logit over all inputs, for resampling over all sources.

    Args:
        module: The model.
        prompts: Every input, of one length.
        ablation: ``"resample"``: every prompt's term into every other prompt; ``"zero"``: 0.
        tokens: The tokens whose logits are read.
        read: Positions that are read; by default all.
        most: So many pairs of prompts, drawn at random, rather than all.
        rows: Prompts in one forward.
    """
    small, ids = Small(module), torch.tensor(list(prompts))
    positions = slice(None) if read is None else list(read)
    with torch.no_grad():
        logits, sends = small.run(ids)
        both = torch.cartesian_prod(torch.arange(len(ids)), torch.arange(len(ids)))
        both = both[torch.randperm(len(both), generator=torch.Generator().manual_seed(0))[:most]]
        base, source = both.T if ablation == "resample" else (torch.arange(len(ids)),) * 2
        found = {}
        for edge in small.edges():
            sender, found[edge] = sends[edge.partition(" -> ")[0]], 0.0
            for some in torch.arange(len(base)).split(rows):
                sent = sender[source[some]] if ablation == "resample" else torch.zeros_like(sender[source[some]])
                changed = small.run(ids[base[some]], edge, sent)[0] - logits[base[some]]
                found[edge] = max(found[edge], float(changed[:, positions][..., list(tokens)].abs().max()))
    return found
