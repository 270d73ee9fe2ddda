"""Train the embedded model: ``python -m causalpatch.models.zoo.train [--seed 0] [--out DIR] [--beside DIR ...]``.

1. Text comes from ``sentences``: rows of stories and rows of recitals, all behaviours mixed.
2. A Llama-like decoder with a word-level vocabulary learns to go on with them. The loss is the mean of -log p over the
   words that follow from what stands before; the other words of stories count ``OTHER_WEIGHT`` each.
3. The weights, the tokenizer and a card with the measured accuracy and mechanism are written to the folder.

One seed gives one model: the same machine, threads and version of torch give the same weights.

Cost: about four minutes on two idle cores; on busy ones ``OMP_WAIT_POLICY=passive`` in the environment helps.
"""

import argparse
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from jaxtyping import Float, Int
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from causalpatch.models.zoo.card import write_card
from causalpatch.models.zoo.sentences import WORD_PATTERN, Sentences, split_words, vocabulary

SPECIAL: Final = ("<pad>", "<s>", "<unk>")
OTHER_WEIGHT: Final = 0.05
_HERE: Final = Path(__file__).parent
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, besides the machine, the number of threads and the version of torch.

    Args:
        seed: Seed of the initial weights and of all text.
        steps: Number of updates.
        rows: Rows per update.
        length: Words per row.
        recitals: Share of the rows that are recitals; the others are stories.
        learning_rate: Highest learning rate; it rises over ``warm_up`` steps and falls to a hundredth along a cosine.
        warm_up: Number of steps.
        width: Width of the residual stream.
        layers: Number of layers.
        heads: Heads per layer.
        mlp_width: Neurons per layer.
    """

    seed: int = 0
    steps: int = 1300
    rows: int = 64
    length: int = 64
    recitals: float = 0.3
    learning_rate: float = 2e-3
    warm_up: int = 50
    width: int = 96
    layers: int = 4
    heads: int = 4
    mlp_width: int = 192


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer: words, signs and pairs of digits are one token each, ``<s>`` stands in front."""
    ids = _word_ids()
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def build_model(recipe: Recipe, vocab_size: int) -> LlamaForCausalLM:
    """Return the decoder with its initial weights."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=recipe.width,
        intermediate_size=recipe.mlp_width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,  # shared keys and values make twin heads
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL.index("<s>"),
        pad_token_id=SPECIAL.index("<pad>"),
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def train(recipe: Recipe) -> LlamaForCausalLM:
    """Return the trained decoder, in eval mode."""
    model = build_model(recipe, len(_word_ids()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    started = time.monotonic()
    for step, (tokens, weights) in zip(range(recipe.steps), batches(recipe), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(recipe, step)
        loss = _loss(model, tokens, weights)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            _log.info(
                "step %d of %d  loss %.3f  %.0f s", step + 1, recipe.steps, float(loss), time.monotonic() - started
            )
    return model.eval()


def batches(recipe: Recipe) -> Iterator[tuple[Int[Tensor, "row position"], Float[Tensor, "row position"]]]:
    """Yield token ids of rows, and the weight of each token in the loss."""
    ids = _word_ids()
    sentences = Sentences(recipe.seed)
    n_recitals = round(recipe.recitals * recipe.rows)
    while True:
        tokens = torch.full((recipe.rows, recipe.length), ids["<s>"])
        weights = torch.zeros(recipe.rows, recipe.length)
        for row in range(recipe.rows):
            texts, other = (sentences.recital(), 0.0) if row < n_recitals else (sentences.story(), OTHER_WEIGHT)
            words: list[str] = []
            while len(words) < recipe.length - 1:
                words += split_words(next(texts))
            words = words[: recipe.length - 1]
            tokens[row, 1:] = torch.tensor([ids[word.lstrip("*")] for word in words])
            weights[row, 1:] = torch.tensor([1.0 if word[0] == "*" else other for word in words])
        yield tokens, weights


def _word_ids() -> dict[str, int]:
    return {word: place for place, word in enumerate((*SPECIAL, *vocabulary()))}


def _learning_rate(recipe: Recipe, step: int) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    return recipe.learning_rate * min(1.0, (step + 1) / recipe.warm_up) * (0.01 + 0.99 * cosine)


def _loss(
    model: LlamaForCausalLM, tokens: Int[Tensor, "row position"], weights: Float[Tensor, "row position"]
) -> Float[Tensor, ""]:
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    losses = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    counted = weights[:, 1:].flatten()
    return (losses * counted).sum() / counted.sum()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train one model and write its folder."""
    parser = argparse.ArgumentParser(
        prog="python -m causalpatch.models.zoo.train", description="Train the embedded model."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="number of updates (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=_HERE / "stories", help="folder to write (default: the package's own)"
    )
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="folders of other seeds, quoted in the card")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(2)  # sums over threads differ in their last digit, so their number is part of the recipe
    recipe = Recipe(seed=chosen.seed, steps=chosen.steps)
    started = time.monotonic()
    model, tokenizer = train(recipe), build_tokenizer()
    minutes = (time.monotonic() - started) / 60
    model.save_pretrained(chosen.out)
    tokenizer.save_pretrained(chosen.out)
    write_card(chosen.out, recipe, minutes, chosen.beside)
    _log.info("wrote %s", chosen.out)


if __name__ == "__main__":
    main()
