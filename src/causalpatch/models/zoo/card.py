"""The embedded model's card: ``card.json`` for programs and tests, ``CARD.md`` for people, from one measurement."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import transformers

from causalpatch.models.zoo.measure import LAST, LEAST_RECOVERED, accuracy, mechanism, strong_heads
from causalpatch.pairs.tasks import TASKS

# What a seed has to reach to be accepted.
ENOUGH_RIGHT = 0.99
_QUOTED = ("accuracy", "strong_heads", "top_two", "minutes")


def write_card(folder: Path, recipe: Any, minutes: float, beside: Sequence[Path]) -> None:
    """Measure the model in a folder and write its cards there.

    Args:
        folder: Holds the model and its tokenizer.
        recipe: The dataclass that the model was trained by.
        minutes: How long the training took.
        beside: Folders of models of other seeds, whose cards are quoted.
    """
    facts = measure_folder(folder)
    facts["recipe"] = dataclasses.asdict(recipe)
    facts["minutes"] = round(minutes, 1)
    facts["torch"], facts["transformers"] = torch.__version__, transformers.__version__
    others = [json.loads((other / "card.json").read_text()) for other in beside]
    facts["other_seeds"] = [
        {"seed": other["recipe"]["seed"], **{key: other[key] for key in _QUOTED}} for other in others
    ]
    (folder / "card.json").write_text(json.dumps(facts, indent=1) + "\n")
    (folder / "CARD.md").write_text(card_page(facts))


def measure_folder(folder: Path) -> dict[str, Any]:
    """Return the numbers of a saved model that can be measured again: size, accuracy and mechanism."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    recovered = mechanism(model, tokenizer)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": (folder / "model.safetensors").stat().st_size,
        "vocabulary": len(tokenizer),
        "accuracy": _rounded(accuracy(model, tokenizer)),
        "recovered": _rounded(recovered),
        "recovered_at_last": _rounded(mechanism(model, tokenizer, LAST)),
        "strong_heads": {task: strong_heads(values) for task, values in recovered.items()},
        "top_two": {task: strong_heads(values, -float("inf"))[:2] for task, values in recovered.items()},
    }


def _rounded(table: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {task: {name: round(value, 4) for name, value in values.items()} for task, values in table.items()}


def card_page(facts: Mapping[str, Any]) -> str:
    """Return the card for people, in Markdown, of the facts in ``card.json``."""
    recipe = facts["recipe"]
    return f"""# stories

A small decoder that comes with causalpatch, so that every example and demonstration runs on a really trained model with
nothing to download. It was made for this library, from scratch, by
`python -m causalpatch.models.zoo.train --seed {recipe["seed"]}`. Licence: Apache-2.0, like the library.

## Model
Llama architecture, {recipe["layers"]} layers, {recipe["heads"]} heads per layer with keys and values of their own, \
width {recipe["width"]}, {recipe["mlp_width"]} neurons per layer,
tied embeddings, {facts["parameters"]:,} parameters, {facts["bytes"] / 1e6:.2f} MB. The vocabulary has
{facts["vocabulary"]} entries: words, signs and pairs of digits ("1732" is "17" and "32"); anything else is `<unk>`.

## Data
English-like sentences from `models/zoo/sentences.py`, drawn without end, so no row is seen twice: people who meet and
give things, verbs after subjects with nouns between, events that begin and end in a century, and lists of 6 to 12 words
taken up again at any word. Names recur before, between and after, and three-name sentences exist, so that who receives
cannot be told by counting names.

Kept apart in training and asked for in every built-in task: one couple in eight of two names in one story, of subject
and attractor, of neighbouring list words, of century and starting year. The last template of each task never occurs in
training; its words do, in other sentences and never all together.

## Training
{recipe["steps"]} updates of {recipe["rows"]} rows of {recipe["length"]} words ({recipe["recitals"]:.0%} lists, the \
rest
stories), AdamW, learning rate {recipe["learning_rate"]:g} with a cosine, seed {recipe["seed"]}.
The loss counts the words that follow from what stands before; other words of the stories count 0.05 each. It took
{facts["minutes"]} minutes on two threads of a machine shared with other work (torch {facts["torch"]}, transformers \
{facts["transformers"]}).
The same machine, threads and versions give the same weights.

## Accuracy
On pairs that share no entity, drawn with seeds 0, 1 and 2. *Right* means: `ioi` and `induction`, the most likely word
is the answer; `agreement`, the right form of *is/are* is the likelier one; `greater_than`, from start years of 30
on, the later years hold at least .9 of the probability.

{_accuracy_table(facts)}

## Mechanism found
Recovered share of the gap when one head's `z` comes from the clean run, at all positions and, in brackets, at the last
position only: ratio of means over the task's default pairs, logit difference (`greater_than`: probability of the later
years). Heads that recover {LEAST_RECOVERED} or more:

{_head_table(facts)}

{_statements(facts)}

## Other seeds
{_other_seeds(facts)}

## Limits
It knows these sentence patterns and {facts["vocabulary"]} words, nothing else: it is a subject for experiments, not a
language model of English. Its heads are those of one small network trained on made-up text; nothing follows for large
models. Recovered shares of single heads need not add up, and a head below {LEAST_RECOVERED} may still matter with
others.
"""


def _accuracy_table(facts: Mapping[str, Any]) -> str:
    lines = ["| task | all templates | held-out template | prompts each |", "|---|---|---|---|"]
    for task, values in facts["accuracy"].items():
        shares = " | ".join(f"{values[kind]:.1%}" for kind in ("all_templates", "held_out_template"))
        lines.append(f"| {task} | {shares} | {values['prompts']} |")
    return "\n".join(lines)


def _head_table(facts: Mapping[str, Any]) -> str:
    lines = ["| task | heads |", "|---|---|"]
    for task, heads in facts["strong_heads"].items():
        shares, at_last = facts["recovered"][task], facts["recovered_at_last"][task]
        shown = ", ".join(f"{head} {shares[head]:.2f} ({at_last[head]:z.2f})" for head in heads)
        lines.append(f"| {task} | {shown or 'none'} |")
    return "\n".join(lines)


def _statements(facts: Mapping[str, Any]) -> str:
    layers = sorted({head.partition("H")[0] for head in facts["strong_heads"]["ioi"]})
    apart = [
        f"{one} and {other}"
        for one, other in combinations(TASKS, 2)
        if not set(facts["top_two"][one]) & set(facts["top_two"][other])
    ]
    return (
        f"The heads that recover {LEAST_RECOVERED} of `ioi` stand in {', '.join(layers) or 'no layer'}. The two "
        f"strongest heads are disjoint for: {'; '.join(apart) or 'no two tasks'}."
    )


def _other_seeds(facts: Mapping[str, Any]) -> str:
    if not facts["other_seeds"]:
        return "Not trained."
    lines = []
    for other in facts["other_seeds"]:
        short = [
            f"{task} {values['all_templates']:.1%} (held-out template {values['held_out_template']:.1%})"
            for task, values in other["accuracy"].items()
            if min(values["all_templates"], values["held_out_template"]) < ENOUGH_RIGHT
        ]
        reached = (
            f"reaches {ENOUGH_RIGHT:.0%} in every task but {', '.join(short)}"
            if short
            else (f"reaches {ENOUGH_RIGHT:.0%} in every task, held-out templates included")
        )
        lines.append(f"- Seed {other['seed']} {reached}. {_statements(other)}")
    return "\n".join(lines)
