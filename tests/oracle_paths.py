"""Path patching by the three runs of Wang et al., with raw hooks on one prompt: the oracle of path patching.

The second run freezes what every head hands to the output projection, and every MLP's output unless it is recomputed,
at the base run's values, puts the senders' values in and lets the whole model run; what the receiver is given is read
off. In the third run that is written, at a hook on the projection or on the norm in front of the MLP. For the logits
the second run's are the answer. Nothing here is shared with the library but the names of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from oracle import Edit, Plain

Spec = tuple[str, int | None, int | None]


@dataclass
class Node:
    """A sender: its site, its base tokens (None: all), the source tokens, and its changed inputs if it is a copy."""

    site: Spec
    tokens: Sequence[int] | None = None
    source: Sequence[int] | None = None
    inputs: list[tuple[Spec, list["Node"]]] = field(default_factory=list)


class ThreeRuns:
    """One prompt of each side."""

    def __init__(self, plain: Plain, base: Sequence[int], source: Sequence[int], *, recompute: bool = False) -> None:
        self.plain, self.base, self.source, self.recompute = plain, list(base), list(source), recompute
        self.n_layers = len(plain.layers)
        z = [("z", layer, head) for layer in range(self.n_layers) for head in range(plain.n_heads)]
        mlps = [("mlp_out", layer, None) for layer in range(self.n_layers)]
        everywhere = range(len(self.base))
        self.frozen = {site: Edit(site, everywhere, plain.value(self.base, site)) for site in (*z, *mlps)}

    def logits(self, received: Sequence[tuple[Spec, list[Node], Sequence[int] | None]]) -> Tensor:
        """Return the logits (position, vocab) of the third run.

        Args:
            received: Each last receiver, its senders, and the tokens at which it receives (None: all).
        """
        (first, senders, tokens), *others = received
        if first[0] == "logits":
            assert not others
            out = self.plain.logits(self.base, self._second(senders))
            if tokens is not None:
                # Elsewhere the stream is the base run's; logits are token by token.
                kept = self.plain.logits(self.base)
                kept[list(tokens)] = out[list(tokens)]
                return kept
            return out
        return self._third(received, None)

    def sent(self, node: Node) -> Edit:
        """Return what a sender puts in."""
        tokens = list(range(len(self.base)) if node.tokens is None else node.tokens)
        if not node.inputs:
            source = tokens if node.source is None else list(node.source)
            return Edit(node.site, tokens, self.plain.value(self.source, node.site)[source])
        value = self._third([(spec, senders, None) for spec, senders in node.inputs], node.site)
        return Edit(node.site, tokens, value[tokens])

    def _second(self, senders: Sequence[Node]) -> list[Edit]:
        edits = [self.sent(node) for node in senders]
        own = {edit.site for edit in edits}
        frozen = [edit for site, edit in self.frozen.items() if site not in own]
        if self.recompute:
            frozen = [edit for edit in frozen if edit.site[0] != "mlp_out"]
        else:
            # A sender that differs at some tokens is frozen at the others.
            edits = [self._filled(edit) for edit in edits]
        return [*frozen, *edits]

    def _filled(self, edit: Edit) -> Edit:
        if edit.site[0] != "mlp_out":
            return edit
        value = self.frozen[edit.site].new.clone()
        value[list(edit.tokens)] = edit.new
        return Edit(edit.site, range(len(self.base)), value)

    def _third(self, received, wanted: Spec | None) -> Tensor:
        """Run the base prompt with receivers changed; return its logits, or the value of a site."""
        handles, kept = [], []
        values = [self._received(spec, senders) for spec, senders, _ in received]
        for (spec, _, tokens), value in zip(received, values, strict=True):
            chosen = list(range(len(self.base)) if tokens is None else tokens)
            if spec[0] == "mlp_in":
                handles += self._at_norm(spec[1], lambda x, v=value, c=chosen: put(x, v, c))
            else:
                handles += self.plain._hook(spec, lambda x, v=value, c=chosen: put(x, v, c))
        if wanted is not None:
            handles += self.plain._hook(wanted, lambda x: (kept.append(x.clone()), x)[1])
        try:
            with torch.no_grad():
                out = self.plain._run(self.base)
        finally:
            for handle in handles:
                handle.remove()
        return out if wanted is None else kept[0]

    def _received(self, spec: Spec, senders: Sequence[Node]) -> Tensor:
        """Return what an input is in the second run."""
        kept: list[Tensor] = []

        def keep(x):
            kept.append(x.clone())
            return x

        edits = self._second(senders)  # runs of their own, which must not be seen
        handles = self._at_norm(spec[1], keep) if spec[0] == "mlp_in" else self.plain._hook(spec, keep)
        try:
            self.plain.logits(self.base, edits)
        finally:
            for handle in handles:
                handle.remove()
        assert len(kept) == 1
        return kept[0]

    def _at_norm(self, layer: int, change) -> list:
        """Pass what the norm in front of the MLP reads through ``change``; the stream itself goes on as it is.

        Where attention and MLP share one norm, the MLP alone is given that norm of what was changed.
        """
        block, parts = self.plain.layers[layer], self.plain.parts
        if getattr(block, parts.reader, None) is not None:
            return [getattr(block, parts.reader).register_forward_pre_hook(partial(_pass_through, change))]
        norm, normed = getattr(block, parts.shared_reader), []

        def again(module, args):
            normed.append(norm.forward(_pass_through(change, norm, args)[0]))

        return [
            norm.register_forward_pre_hook(again),
            getattr(block, parts.mlp_out).register_forward_pre_hook(lambda *_: normed.pop()),
        ]


def _pass_through(change, module, args: tuple) -> tuple:
    """Pass what a norm reads of one prompt through ``change``."""
    x = args[0]  # some layers lay rows and positions into one axis in front of the norm
    return (change(x[0])[None] if x.ndim == 3 else change(x), *args[1:])


def put(x: Tensor, value: Tensor, tokens: list[int]) -> Tensor:
    x = x.clone()
    x[tokens] = value[tokens]
    return x
