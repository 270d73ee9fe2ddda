"""What metrics read, and from where it can be reached: which patches can matter at all.

A metric reads the logits of a few tokens. Going back from these through the layers, along what the captured masks let
each token see, gives for every layer the tokens whose stream can still matter. A patch elsewhere changes nothing that
is measured, whatever its value.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int


@dataclass(frozen=True)
class Reads:
    """The tokens that metrics read in some prompts.

    Args:
        tokens: Real tokens, one column for each thing that is read, ``(prompt, read)``.
        kinds: For each prompt the number of its kind; prompts of one kind are read at the same tokens.
        of_kind: The tokens of each kind, sorted, without repeats.
    """

    tokens: Int[np.ndarray, "prompt read"]
    kinds: Int[np.ndarray, " prompt"]
    of_kind: Sequence[np.ndarray]

    @classmethod
    def of(cls, tokens: Int[np.ndarray, "prompt read"]) -> "Reads":
        """Find the kinds among prompts."""
        kinds: dict[tuple[int, ...], int] = {}
        numbers = [kinds.setdefault(tuple(sorted(set(row))), len(kinds)) for row in tokens.tolist()]
        return cls(tokens, np.array(numbers, dtype=np.int64), [np.array(kind, dtype=np.int64) for kind in kinds])

    @property
    def stops(self) -> Int[np.ndarray, " prompt"]:
        """One past the last token that is read."""
        stops: np.ndarray = self.tokens.max(1) + 1
        return stops


def what_matters(
    visible: Sequence[Bool[np.ndarray, "batch query_position key_position"]], reads: Reads
) -> Bool[np.ndarray, "depth prompt position"]:
    """Say at which tokens the stream can matter to what is read.

    Args:
        visible: For each layer, which keys each token sees, ``(prompt or 1, query_position, key_position)``.
        reads: What is read.

    Returns:
        For the stream into each layer, and last into the final norm, whether a change there can reach what is read.
    """
    n_prompts, n_tokens = len(reads.tokens), visible[0].shape[-1]
    matters = np.zeros((len(visible) + 1, n_prompts, n_tokens), dtype=bool)
    matters[-1][np.arange(n_prompts)[:, None], reads.tokens] = True
    for layer in reversed(range(len(visible))):
        above = matters[layer + 1]
        if layer + 1 < len(visible) and visible[layer] is visible[layer + 1] and (above == matters[layer + 2]).all():
            matters[layer] = above  # a full mask reaches everything in one step
            continue
        seen = np.einsum("pq,pqk->pk", above.astype(np.float32), visible[layer].astype(np.float32)) > 0
        matters[layer] = above | seen
    return matters
