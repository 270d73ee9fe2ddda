"""Break the library in one line at a time, and see that a test notices each time; write benchmarks/MUTANTS.md.

Each mutant is a line of the source and what it becomes. It is put into a temporary copy of ``src``, never into the
working tree, and a few tests run against the copy. First they all run against an unbroken copy and must pass.

Usage: python -m benchmarks.mutants [--only WORD]
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "benchmarks" / "MUTANTS.md"
TESTS_FAILED = 1  # pytest's exit code for red tests; 2 to 5 say that it could not run them


@dataclass(frozen=True)
class Mutant:
    """One broken line.

    Args:
        name: What is wrong.
        file: The file, below ``src/causalpatch``.
        line: The line without its indentation; it must stand in the file once.
        broken: What it becomes.
        tests: Arguments of pytest that select the tests to run.
    """

    name: str
    file: str
    line: str
    broken: str
    tests: tuple[str, ...]


STREAMS = "tests/laws/test_streams.py"
PLAIN_HOOKS = "tests/laws/test_plain_hooks.py"
INVARIANCE = "tests/laws/test_invariance.py"
VALUES = "tests/laws/test_values.py"
METRICS = "tests/laws/test_metrics.py"
HOOKS = "tests/unit/engine/test_hooks.py"
CANONICAL = "tests/unit/engine/test_canonical.py"
MEANS = "tests/unit/engine/test_means.py"
RESTART = "tests/unit/engine/test_restart.py"
TIERS = "tests/laws/test_tiers.py"
MASKS = "tests/unit/engine/test_wavefront_masks.py"
DERIVED = "tests/unit/engine/test_wavefront_derived.py"
ODD_MODELS = "tests/unit/engine/test_wavefront_models.py"
NUMBERS = "tests/unit/engine/test_wavefront_numbers.py"
CLEAN = "tests/unit/engine/test_wavefront_cleanliness.py"
UNCHANGED = "tests/unit/engine/test_unchanged_rows.py"
MUTANTS = (
    Mutant(
        "a head's slice is its neighbour's",
        "models/table.py",
        "return (fact.part * n_units + unit) * width",
        "return (fact.part * n_units + (unit ^ 1) % n_units) * width",
        (PLAIN_HOOKS, "-k", "llama"),
    ),
    Mutant(
        "fused q, k, v of GPT-NeoX read as thirds, not head by head",
        "models/table.py",
        "if not fact.by_unit:",
        "if True:",
        (PLAIN_HOOKS, "-k", "gpt_neox"),
    ),
    Mutant(
        "fused q, k, v of Falcon read as if every head had a key of its own",
        "models/table.py",
        "return group * (n_group + 2) + member",
        "return group * 3 + member",
        (PLAIN_HOOKS, "-k", "falcon_grouped"),
    ),
    Mutant(
        "a value of latent attention is read where its head's key is",
        "models/table.py",
        "return unit * stretch + (stretch - width if fact.part == fact.parts - 1 else fact.part * width)",
        "return unit * stretch",
        (PLAIN_HOOKS, "-k", "deepseek"),
    ),
    Mutant(
        "what Granite adds to the stream is taken without its multiplier",
        "models/views.py",
        "return x * self.factor",
        "return x",
        (PLAIN_HOOKS, "-k", "granite"),
    ),
    Mutant(
        "gate and up of Phi-3 are taken for each other",
        "models/families/phi3.py",
        '"mlp_gate": Parted("mlp.gate_up_proj", "output", part=0, parts=2),',
        '"mlp_gate": Parted("mlp.gate_up_proj", "output", part=1, parts=2),',
        (PLAIN_HOOKS, "-k", "phi3"),
    ),
    Mutant(
        "rows of a pattern with sinks are put back to a sum of 1",
        "engine/attention.py",
        "return torch.cat([scores, column], -1).softmax(-1, dtype=wide)[..., :-1]",
        "return torch.cat([scores, column - 1e4], -1).softmax(-1, dtype=wide)[..., :-1]",
        (PLAIN_HOOKS, "-k", "gpt_oss"),
    ),
    Mutant(
        "what BLOOM's attention adds is taken with the stream",
        "models/families/bloom.py",
        '"attn_out": At("self_attention.dense", "output"),',
        '"attn_out": At("self_attention", "output"),',
        (PLAIN_HOOKS, "-k", "bloom"),
    ),
    Mutant(
        "a head's share replaces the other heads and the bias too",
        "models/views.py",
        "x[index] = x[index] + (value - self.read(x, companions)[index])",
        "x[index] = value",
        (STREAMS, "-k", "share and gpt2"),
    ),
    Mutant(
        "positions off by one",
        "pairs/positions.py",
        "return np.array([position % length], dtype=np.int64)",
        "return np.array([(position + 1) % length], dtype=np.int64)",
        (PLAIN_HOOKS, "-k", "llama"),
    ),
    Mutant(
        "the source's place is written, not the base's",
        "engine/values.py",
        "places = locate(kind.target, elements.rows, None if elements.placement is None else elements.placement.base)",
        "places = locate(kind.target, elements.rows, None if elements.placement is None else elements.placement.start)",
        (PLAIN_HOOKS, "-k", "llama"),
    ),
    Mutant(
        "padding is attended to",
        "pairs/batch.py",
        "mask = (counted >= 0) & (counted < sizes[:, None])",
        "mask = (counted >= 0) | (counted < sizes[:, None])",
        (INVARIANCE, "-k", "padd and llama"),
    ),
    Mutant(
        "prompts run under the masks of others",
        "engine/capture.py",
        "call = model.inputs(batch.ids, batch.mask, batch.position_ids, further, encoder)",
        "call = model.inputs(batch.ids, batch.mask[::-1].copy(), batch.position_ids, further, encoder)",
        (INVARIANCE, "-k", "padd and llama"),
    ),
    Mutant(
        "the clean run is given the corrupted prompts",
        "engine/untouched.py",
        "inputs = job.pairs.batch(role, indices, padding_side=job.padding_side)",
        "inputs = job.pairs.batch(job.base, indices, padding_side=job.padding_side)",
        (STREAMS, "-k", "resid_pre and llama"),
    ),
    Mutant(
        "padding counts in means",
        "engine/means.py",
        "value = value[torch.as_tensor(batch.mask, device=value.device)]",
        "value = value[torch.as_tensor(batch.mask | (batch.start[:, None] == 0), device=value.device)]",
        (MEANS,),
    ),
    Mutant(
        "numbers are booked under other pairs",
        "engine/batches.py",
        "pairs = np.array([row.pair for row in some])",
        "pairs = np.array([row.pair for row in some])[::-1]",
        (RESTART,),
    ),
    Mutant(
        "a query head is said to be served by the kv_head of another group",
        "sites/select.py",
        "serves = site.unit // (n_heads // count)",
        "serves = site.unit % count",
        ("tests/unit/sites/test_select.py",),
    ),
    Mutant(
        "hooks stay in the model",
        "engine/hooks.py",
        "hooks.callback(handle.remove)",
        "hooks.callback(handle.id.bit_length)",
        (HOOKS, "-k", "gone"),
    ),
    Mutant(
        "the model is left in eval mode",
        "engine/hooks.py",
        "module.training = True",
        "module.training = False",
        (HOOKS, "-k", "eval_mode"),
    ),
    Mutant(
        "a patch that did not fire is no error",
        "engine/hooks.py",
        "if state.times_run == 1:",
        "if state.times_run <= 1:",
        (HOOKS, "-k", "does_not_run"),
    ),
    Mutant(
        "the logit difference has its sign flipped",
        "metrics/logits.py",
        'return outputs.answer_logits("answer").logsumexp(1) - outputs.answer_logits("wrong_answer").logsumexp(1)',
        'return outputs.answer_logits("wrong_answer").logsumexp(1) - outputs.answer_logits("answer").logsumexp(1)',
        (METRICS, "-k", "llama"),
    ),
    Mutant(
        "noise is reported with the sign of denoise",
        "results/shares.py",
        "return self.sign * _divide(self.mean_effect(), np.where(kept, gap, 0.0))",
        "return _divide(self.mean_effect(), np.where(kept, gap, 0.0))",
        ("tests/unit/results",),
    ),
    Mutant(
        "every pair counts as independent",
        "experiment/experiment.py",
        "groups=self.pairs.components[kept],",
        "groups=np.arange(len(kept)),",
        ("tests/unit/experiment/test_components.py",),
    ),
    Mutant(
        "rows attend to base keys of other prompts",
        "engine/rows.py",
        "keys = seen.keys[slots, :, :n_base].transpose(0, 1)",
        "keys = seen.keys[slots.flip(0), :, :n_base].transpose(0, 1)",
        (NUMBERS,),
    ),
    Mutant(
        "rows attend to base values of the token before",
        "engine/rows.py",
        "values = seen.values[slots, :, :n_base].transpose(0, 1)",
        "values = seen.values[slots, :, :n_base].roll(1, 2).transpose(0, 1)",
        (TIERS, "-k", "whatever and llama"),
    ),
    Mutant(
        "rows see what their window hides",
        "engine/rows.py",
        "hidden = torch.as_tensor(~part, device=seen.mask.device)",
        "hidden = torch.as_tensor(np.broadcast_to(~part[:, -1:], part.shape), device=seen.mask.device)",
        (MASKS, "-k", "window and mistral"),
    ),
    Mutant(
        "fused attention of long segments forgets the base's keys",
        "engine/rows.py",
        "both = torch.logaddexp(total, weight)",
        "both = torch.logaddexp(total, weight - 100)",
        (NUMBERS, "-k", "long_segments and left and llama"),
    ),
    Mutant(
        "single tokens do not attend to themselves",
        "engine/rows.py",
        "scores[..., n_base] = (some * own_keys).sum(-1)",
        "scores[..., n_base] = 0",
        (NUMBERS, "-k", "long_segments and left and llama"),
    ),
    Mutant(
        "a soft-cap on the scores is left out",
        "engine/rows.py",
        "if seen.softcap is not None:",
        "if False:",
        (NUMBERS, "-k", "soft_cap_on_the_scores"),
    ),
    Mutant(
        "the last token that is read is not run",
        "engine/reads.py",
        "stops: np.ndarray = self.tokens.max(1) + 1",
        "stops: np.ndarray = np.maximum(self.tokens.max(1), 1)",
        (TIERS, "-k", "whatever and llama"),
    ),
    Mutant(
        "what matters is sought in the layer itself alone, not through attention",
        "engine/reads.py",
        "matters[layer] = above | seen",
        "matters[layer] = above",
        (TIERS, "-k", "whatever and mistral"),
    ),
    Mutant(
        "what undoes an earlier patch counts as changing nothing",
        "engine/scene.py",
        "if is_alone or not any(one.any() for one in differs):",
        "if True:",
        (DERIVED, "-k", "equal_in_some"),
    ),
    Mutant(
        "derived cells get the source run's numbers",
        "engine/wavefront.py",
        'derived = Block.of(numbers, pairs, self.untouched["base"][:, local], Status.DERIVED)',
        'derived = Block.of(numbers, pairs, self.untouched["source"][:, local], Status.DERIVED)',
        (DERIVED, "-k", "before_the_first and llama"),
    ),
    Mutant(
        "values are equal where one of their columns is",
        "engine/values.py",
        "answer = same.reshape(len(same), -1).all(1).cpu().numpy()",
        "answer = same.reshape(len(same), -1).any(1).cpu().numpy()",
        (DERIVED, "-k", "equal_in_some"),
    ),
    Mutant(
        "the stream out of a layer is taken for the stream into the same layer",
        "engine/canonical.py",
        'return Site("resid_pre", site.layer + 1)',
        'return Site("resid_pre", site.layer)',
        (CANONICAL,),
    ),
    Mutant(
        "patches at different tokens count as the same run",
        "engine/canonical.py",
        "place = (target.site, target.position, target.column, target.align)",
        "place = (target.site, target.column, target.align)",
        (MASKS, "-k", "every_site and llama"),
    ),
    Mutant(
        "functions of one name count as the same value",
        "engine/canonical.py",
        "return (*place, value if by_value else id(value), target.inside)",
        "return (*place, str(value), target.inside)",
        (DERIVED, "-k", "same_object"),
    ),
    Mutant(
        "a stream that changes between two layers goes unseen",
        "engine/stack.py",
        "if self.output is not None and not torch.equal(self.output, pick_input(self.stack.final_norm, args, kwargs)):",
        "if False:",
        (ODD_MODELS, "-k", "look"),
    ),
    Mutant(
        "tokens that see later ones go unseen",
        "engine/stack.py",
        "if (is_seen & future & real[:, :, None] & real[:, None, :]).any():",
        "if False:",
        (ODD_MODELS, "-k", "look"),
    ),
    Mutant(
        "engines are trusted without a check",
        "engine/selfcheck.py",
        "if np.nanmax(excess) <= 1 and (np.isnan(got) == np.isnan(wanted)).all():",
        "if True:",
        (ODD_MODELS, "-k", "mixes or counts"),
    ),
    Mutant(
        "the user's hooks go unseen",
        "engine/recorders.py",
        "hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())",
        "hooks = ()",
        (CLEAN, "-k", "obeyed"),
    ),
    Mutant(
        "rows are given the positions of their neighbours",
        "engine/stack.py",
        "return (held[0, place.position] if held.shape[0] == 1 else place.rows_of(held))[None]",
        "return (held[0, place.position] if held.shape[0] == 1 else place.rows_of(held).roll(1, 0))[None]",
        (TIERS, "-k", "whatever and llama"),
    ),
    Mutant(
        "in parallel blocks a patch of both sublayers loses the MLP's",
        "engine/wave.py",
        "if is_apart and not self.targets.any_at(layer, layout.chosen, (UP, DOWN)):",
        "if is_apart:",
        (NUMBERS, "-k", "both_sublayers"),
    ),
    Mutant(
        "rows that are written count as unchanged",
        "engine/unchanged_rows.py",
        "changed[found[found >= 0]] = True",
        "changed[found[found > 0]] = True",
        (UNCHANGED, "-k", "full_forwards and gemma2"),
    ),
    Mutant(
        "unchanged rows take the queries, keys and values of other tokens",
        "engine/unchanged_rows.py",
        "base = Place(place.slot[rest], place.position[rest])",
        "base = Place(place.slot[rest], place.position[rest].roll(1))",
        (UNCHANGED, "-k", "full_forwards and gpt2"),
    ),
    Mutant(
        "a layer below is forgotten where its patch enters behind attention",
        "engine/unchanged_rows.py",
        "if entry.depth == first and place is not None and target.site.name not in _BEHIND_STREAM:",
        "if entry.layer == first and place is not None and target.site.name not in _BEHIND_STREAM:",
        (UNCHANGED, "-k", "full_forwards and gemma2"),
    ),
    Mutant(
        "modules that were passed by stay so",
        "engine/bypass.py",
        'del module.__dict__["forward"]',
        "pass",
        (CLEAN, "-k", "run_leaves and llama"),
    ),
    Mutant(
        "runs begin one layer late",
        "engine/restart.py",
        "return _layer(layers, target) or 0",
        "return min((_layer(layers, target) or 0) + 1, len(layers) - 1)",
        (TIERS, "-k", "whatever and llama"),
    ),
    Mutant(
        "restarted runs get the streams of other pairs",
        "engine/restart.py",
        "known[site] = stream.narrow(1, first, n_columns)[local.to(stream.device)]",
        "known[site] = stream.narrow(1, first, n_columns)[local.flip(0).to(stream.device)]",
        (TIERS, "-k", "whatever and llama"),
    ),
    Mutant(
        "streams padded on the left are cut on the right",
        "engine/restart.py",
        'first = stream.shape[1] - n_columns if job.padding_side == "left" else 0',
        "first = 0",
        (RESTART,),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        metavar="WORD",
        action="append",
        default=[],
        help="run the mutants whose name or file holds this, and leave the other rows of the page as they are",
    )
    words = parser.parse_args(argv).only
    chosen = [each for each in MUTANTS if not words or any(word in f"{each.name} {each.file}" for word in words)]
    for mutant in chosen:
        find_line(ROOT / "src" / "causalpatch" / mutant.file, mutant)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        caught = try_all(chosen, Path(folder))
    REPORT.write_text(report(caught, rows_before() if words else {}), encoding="utf-8")
    print(f"written: {REPORT.relative_to(ROOT)}")
    survivors = [mutant.name for mutant, test in caught if test is None]
    print(f"{len(caught) - len(survivors)} of {len(caught)} mutants were caught")
    for name in survivors:
        print(f"  survived: {name}")
    return 1 if survivors else 0


def try_all(mutants: Sequence[Mutant], folder: Path) -> list[tuple[Mutant, str | None]]:
    """Return each mutant with the first test that was red; None where all were green."""
    copy = folder / "src"
    shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    require_copy(copy)
    for selection in dict.fromkeys(mutant.tests for mutant in mutants):
        code, said = run_tests(copy, selection)
        if code:
            sys.exit(f"these tests are red without any mutant: {' '.join(selection)}\n{said[-3000:]}")
    caught: list[tuple[Mutant, str | None]] = []
    for mutant in mutants:
        path = copy / "causalpatch" / mutant.file
        original = path.read_text(encoding="utf-8")
        number = find_line(path, mutant)
        lines = original.split("\n")
        lines[number] = lines[number].replace(mutant.line, mutant.broken)
        started = time.perf_counter()
        try:
            path.write_text("\n".join(lines), encoding="utf-8")
            code, said = run_tests(copy, mutant.tests)
        finally:
            path.write_text(original, encoding="utf-8")
        if code not in (0, TESTS_FAILED):
            sys.exit(f"the tests could not run with the mutant {mutant.name!r} (exit code {code})\n{said[-3000:]}")
        red = re.search(r"^(?:FAILED|ERROR) (\S+)", said, flags=re.MULTILINE)
        why = re.search(r"^/\S+:\d+: (.{0,100})", said, flags=re.MULTILINE)
        caught.append((mutant, red[1] if red else None))
        word = "caught  " if red else "SURVIVED"
        print(f"{word}  {mutant.name}  ({time.perf_counter() - started:.0f} s)  {why[1] if why else ''}", flush=True)
    return caught


def find_line(path: Path, mutant: Mutant) -> int:
    """Return the index of the line to break; leave the program where it does not stand there exactly once."""
    if not path.is_file():
        sys.exit(f"the mutant {mutant.name!r} is out of date: there is no file {mutant.file}")
    found = [n for n, line in enumerate(path.read_text(encoding="utf-8").split("\n")) if line.strip() == mutant.line]
    if len(found) != 1:
        sys.exit(
            f"the mutant {mutant.name!r} is out of date: its line stands {len(found)} times in {mutant.file}\n"
            f"  {mutant.line}"
        )
    return found[0]


def run_tests(copy: Path, selection: Sequence[str]) -> tuple[int, str]:
    """Run tests against a copy of the source until the first is red; return pytest's exit code and what it said."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:xdist", "-m", "not slow", "--tb=line", *selection]
    done = subprocess.run(command, cwd=ROOT, env=environment(copy), capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def require_copy(copy: Path) -> None:
    """Make sure that Python takes the copy, and not the package that is installed."""
    command = [sys.executable, "-c", "import causalpatch; print(causalpatch.__file__)"]
    done = subprocess.run(command, cwd=ROOT, env=environment(copy), capture_output=True, text=True, check=True)
    if not Path(done.stdout.strip()).is_relative_to(copy):
        sys.exit(f"Python does not take the copy in {copy}, but {done.stdout.strip()}")


def environment(copy: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


def rows_before() -> dict[str, str]:
    """Return the rows of the page as it is, by what is broken."""
    lines = REPORT.read_text(encoding="utf-8").splitlines() if REPORT.exists() else []
    rows = [line for line in lines if line.startswith("| ") and "`pytest " in line]
    return {line.split(" | ")[0].removeprefix("| "): line for line in rows}


def report(caught: Sequence[tuple[Mutant, str | None]], before: Mapping[str, str]) -> str:
    """Return the page: the rows that were made now, and those before of all other mutants that there are."""
    now = {
        mutant.name: f"| {mutant.name} | `{mutant.file}` | {f'`{test}`' if test else '**none**'} | "
        f"`pytest {shown(mutant.tests)}` |"
        for mutant, test in caught
    }
    rows = [now.get(each.name) or before.get(each.name) for each in MUTANTS]
    rows = [row for row in rows if row]
    n_caught = sum("**none**" not in row for row in rows)
    return "\n".join(
        [
            "# Mutants",
            "",
            f"{n_caught} of {len(rows)} one-line breakages turn a test red. Made by `make mutants`, Python "
            f"{platform.python_version()}, torch {torch.__version__}; `--only WORD` makes some rows anew. The broken",
            "lines stand in `benchmarks/mutants.py`. Each is put into a temporary copy of the source, and the tests of",
            "the last column run against it until the first is red.",
            "",
            "| what is broken | file | first red test | tests that ran |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def shown(selection: Sequence[str]) -> str:
    return " ".join(f'"{word}"' if " " in word else word for word in selection)


if __name__ == "__main__":
    sys.exit(main())
