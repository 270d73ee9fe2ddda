"""Prompts to token ids: special tokens once, answers in context, spans of text as ranges of tokens."""

from typing import TypeAlias

from causalpatch.base.errors import AnswerError, PairError
from causalpatch.base.tokens import Tokenizer

Offsets: TypeAlias = list[tuple[int, int]]
# Signs with which tokenizers write a space.
_BLANKS = " \t\n▁ĠĊ"
_UNKNOWN = ("<unk>", "[UNK]", "<UNK>")


def is_unknown(tokenizer: Tokenizer, token_id: int) -> bool:
    """Tell whether a token stands for any word that the tokenizer does not know."""
    return tokenizer.label(token_id).strip() in _UNKNOWN


class Prompts:
    """A tokenizer seen from pairs of prompts.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self._special: tuple[int, int] | None = None

    def ids(self, text: str) -> list[int]:
        """Return the ids of a prompt with the model's special tokens once.

        A text that already begins with them, as a chat template writes it, is given none a second time.

        Args:
            text: The prompt.
        """
        if text not in self._known:
            ids = self.tokenizer.encode(text)
            start, stop = self._kept(text, ids)
            self._known[text] = ids[start:stop]
        return self._known[text]

    def answer(self, prompt: str, answer: str, where: str) -> tuple[int, ...]:
        """Return the ids of an answer in context: ids(prompt + answer) without ids(prompt).

        Args:
            prompt: The prompt that it follows.
            answer: The answer, with the space before it where there is one.
            where: How errors call the pair.

        Raises:
            AnswerError: The answer is empty, holds a word that the tokenizer does not know, or merges with the end of
                the prompt.
        """
        before, whole = self._open(prompt), self._open(prompt + answer)
        if whole[: len(before)] != before:
            kept = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(whole))
            raise AnswerError(
                f"the answer {answer!r} of {where} changes the tokens of the prompt that it follows",
                facts=[
                    ("prompt ends", self._shown(before[max(0, kept - 1) :])),
                    ("with answer", self._shown(whole[max(0, kept - 1) :])),
                ],
                fix=f"put the space before the answer ({' ' + answer.lstrip()!r}), or give its id",
            )
        if len(whole) == len(before):
            raise AnswerError(f"the answer {answer!r} of {where} has no tokens", fix="give a text that is not empty")
        found = tuple(whole[len(before) :])
        if any(is_unknown(self.tokenizer, token) for token in found):
            raise AnswerError(
                f"the answer {answer!r} of {where} is not in the model's vocabulary",
                facts=[("tokens", self._shown(list(found)))],
                fix="ask for a word that the model knows",
            )
        return found

    def span(self, prompt: str, text: str, name: str, where: str) -> tuple[int, int]:
        """Return the half-open range of tokens that a text covers in a prompt.

        A token belongs to the span if it holds at least one of its characters; tokens of mere space at its edges do
        not, unless the text has a space there.

        Args:
            prompt: The prompt.
            text: The text, which must stand in it once.
            name: The span's name.
            where: How errors call the prompt.

        Raises:
            PairError: The text does not stand in the prompt, stands there twice, or covers no token.
        """
        starts = [i for i in range(len(prompt)) if text and prompt.startswith(text, i)]
        if len(starts) != 1:
            times = "does not occur" if not starts else f"occurs {len(starts)} times"
            raise PairError(
                f"span '{name}' ({text!r}) {times} in {where}",
                facts=[("prompt", repr(prompt if len(prompt) < 90 else prompt[:87] + "…"))],
                fix=f'give its tokens instead: {{"{name}": [first, last + 1]}}',
            )
        return self.covering(prompt, starts[0], starts[0] + len(text), name, where)

    def covering(self, prompt: str, start: int, stop: int, name: str, where: str) -> tuple[int, int]:
        """Return the half-open range of tokens that characters of a prompt are held by.

        Args:
            prompt: The prompt.
            start: The first character.
            stop: The one behind the last.
            name: The span's name.
            where: How errors call the prompt.

        Raises:
            PairError: No token holds one of them.
        """
        text = prompt[start:stop]
        ids, offsets = self.ids(prompt), self._offsets(prompt)
        held = [k for k, (a, b) in enumerate(offsets) if max(a, start) < min(b, stop)]
        while held and not text[0].isspace() and self._is_blank(ids[held[0]]):
            held = held[1:]
        while held and not text[-1].isspace() and self._is_blank(ids[held[-1]]):
            held = held[:-1]
        if not held:
            raise PairError(f"span '{name}' ({text!r}) covers no token of {where}", fix="name a longer text")
        return held[0], held[-1] + 1

    def _offsets(self, text: str) -> Offsets:
        """Return the characters that each token of ``ids`` covers."""
        ids, offsets = self.tokenizer.encode_with_offsets(text)
        start, stop = self._kept(text, ids)
        return offsets[start:stop]

    def _kept(self, text: str, ids: list[int]) -> tuple[int, int]:
        """Return the part of the ids that leaves out special tokens which the text already had."""
        n_before, n_after = self._n_special(text)
        start, stop = 0, len(ids)
        if n_before and ids[n_before : 2 * n_before] == ids[:n_before]:
            start = n_before
        if n_after and ids[-2 * n_after : -n_after] == ids[-n_after:]:
            stop -= n_after
        return start, stop

    def _n_special(self, text: str) -> tuple[int, int]:
        """Count the special tokens that the tokenizer puts before and after a text."""
        if self._special is None:
            bare, whole = self.tokenizer.encode(text, special=False), self.tokenizer.encode(text)
            n_added = len(whole) - len(bare)
            if n_added <= 0:  # no special tokens, or a text that has them already: the next text may tell
                return 0, 0
            fits = [k for k in range(n_added + 1) if whole[k : k + len(bare)] == bare]
            # Of a text that begins with the special token several offsets fit; the last one puts it in front.
            n_before = fits[-1] if fits else n_added
            self._special = (n_before, n_added - n_before)
        return self._special

    def _open(self, text: str) -> list[int]:
        """Return the ids without special tokens at the end, so that a text can go on."""
        ids = self.ids(text)
        return ids[: len(ids) - self._n_special(text)[1]]

    def _is_blank(self, token_id: int) -> bool:
        return not self.tokenizer.label(token_id).strip(_BLANKS)

    def _shown(self, ids: list[int]) -> str:
        shown = " ".join(repr(self.tokenizer.label(token)) for token in ids[:5])
        return shown or "(nothing)"
