"""Time sweeps against hand-written hooks and write benchmarks/RESULTS.md.

Every contender patches the same cells of the same model on the same pairs, and its numbers must agree with the others'
before its time counts. Contenders are interleaved, repeated, and their medians compared: machines are noisy, ratios
within one run are not. The machine's float32 GEMM rate is measured in the same run.

Usage: python -m benchmarks.run [--repeats N] [--quick]
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import nn

import causalpatch as cp
from causalpatch.pairs import Pair, Pairs

ROOT = Path(__file__).resolve().parents[1]
STORIES = ROOT.parent / "shared" / "models" / "stories260k"


@dataclass(frozen=True)
class Workload:
    """One sweep, and how a person would write it by hand with hooks."""

    name: str
    experiment: cp.Experiment
    site: str
    by_hand: Callable[[], np.ndarray]

    def ours(self) -> np.ndarray:
        return cp.sweep(self.experiment, self.site).to_xarray()["metric"].values


def gpt2_small() -> cp.Model:
    """GPT-2 small's shape with random weights, spread so that attention looks at something."""
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415 - only this workload needs it

    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim >= 2 and not name.endswith(("wte.weight", "wpe.weight", "lm_head.weight")):
                parameter.mul_(2.0)
    return cp.open_model(module.requires_grad_(requires_grad=False))


def random_pairs(n_pairs: int, n_tokens: int, vocab: int) -> Pairs:
    """Random prompts that differ in three tokens, with random answers."""
    draw = np.random.default_rng(1)
    pairs = []
    for number in range(n_pairs):
        clean = draw.integers(0, vocab, n_tokens)
        corrupt = clean.copy()
        corrupt[[2, n_tokens // 3, n_tokens // 2]] = draw.integers(0, vocab, 3)
        right, wrong = (((int(token),),) for token in draw.integers(0, vocab, 2))
        pairs.append(Pair(clean, corrupt, right, wrong, id=str(number)))
    return Pairs(pairs, name=f"random {n_pairs} x {n_tokens}")


def hooks_by_hand(experiment: cp.Experiment, module: nn.Module, layers: nn.ModuleList, site: str) -> np.ndarray:
    """One forward per cell with plain hooks, all pairs in a batch: how most people write a sweep."""
    pairs, config = experiment.pairs, module.config
    clean, corrupt = (torch.tensor(np.stack([p.input(role) for p in pairs])) for role in ("clean", "corrupt"))
    right, wrong = (torch.tensor([getattr(p, side)[0][0] for p in pairs]) for side in ("answer", "wrong_answer"))
    rows = torch.arange(len(pairs))

    def metric(ids: torch.Tensor) -> np.ndarray:
        logits = module(ids, use_cache=False).logits[:, -1]
        return (logits[rows, right] - logits[rows, wrong]).double().numpy()

    is_gpt2 = config.model_type == "gpt2"
    heads = [layer.attn.c_proj if is_gpt2 else layer.self_attn.o_proj for layer in layers]
    places = list(layers) if site == "resid_pre" else heads
    kept: dict[int, torch.Tensor] = {}
    hooks = [
        place.register_forward_pre_hook(lambda m, args, i=i: kept.__setitem__(i, args[0].clone()))
        for i, place in enumerate(places)
    ]
    with torch.no_grad():
        metric(clean)
        for hook in hooks:
            hook.remove()
        width = kept[0].shape[-1] // config.num_attention_heads
        n_cells = clean.shape[1] if site == "resid_pre" else config.num_attention_heads
        found = np.empty((len(places), n_cells, len(pairs)))
        for i, place in enumerate(places):
            for cell in range(n_cells):

                def put(m: nn.Module, args: tuple, i: int = i, cell: int = cell) -> tuple:
                    value = args[0].clone()
                    if site == "resid_pre":
                        value[:, cell] = kept[i][:, cell]
                    elif site == "z@-1":
                        value[:, -1, cell * width : (cell + 1) * width] = kept[i][
                            :, -1, cell * width : (cell + 1) * width
                        ]
                    else:
                        value[..., cell * width : (cell + 1) * width] = kept[i][..., cell * width : (cell + 1) * width]
                    return (value, *args[1:])

                hook = place.register_forward_pre_hook(put)
                found[i, cell] = metric(corrupt)
                hook.remove()
    return found


def workloads(*, quick: bool) -> list[Workload]:
    found = []
    if STORIES.is_dir():
        model = cp.open_model(STORIES)
        pairs = cp.load_pairs(STORIES / "pairs.jsonl", model).where(behaviour="name_copy")
        lengths = pairs.lengths("clean")
        pairs = pairs.take(np.flatnonzero(lengths == np.bincount(lengths).argmax()))
        for site in ("z@-1", "resid_pre"):
            found.append(_workload(f"stories260k, {site}", model, pairs, site, model.module.model.layers))
    else:
        print(f"skipped: the folder with trained models is not there: {STORIES}", file=sys.stderr)
    if not quick:
        model = gpt2_small()
        pairs = random_pairs(4, 16, model.vocab_size)
        for site in ("resid_pre", "z"):
            found.append(_workload(f"GPT-2 small shape, {site}", model, pairs, site, model.module.transformer.h))
    return found


def _workload(name: str, model: cp.Model, pairs: Pairs, site: str, layers: nn.ModuleList) -> Workload:
    experiment = cp.Experiment(model, pairs, show_progress=False)
    title = f"{name}, {len(pairs)} pairs x {int(pairs.lengths('clean').max())} tokens"
    return Workload(title, experiment, site, lambda: hooks_by_hand(experiment, model.module, layers, site))


def gemm_rate() -> float:
    """Return GFLOP/s of a float32 matrix product, the best of ten."""
    a, b = torch.randn(1024, 2048), torch.randn(2048, 2048)
    times = []
    for _ in range(10):
        started = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - started)
    return 2 * 1024 * 2048 * 2048 / min(times) / 1e9


def start_up() -> list[tuple[str, float]]:
    """Return the smallest of five start-up times in seconds, each in a process of its own."""
    words = {
        "import causalpatch": [sys.executable, "-c", "import causalpatch"],
        "causalpatch --help": [sys.executable, "-c", "from causalpatch.cli.main import main; main(['--help'])"],
        "python alone": [sys.executable, "-c", "pass"],
    }
    found = []
    for name, command in words.items():
        times = []
        for _ in range(5):
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - started)
        found.append((name, min(times)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="leave the GPT-2 shape out")
    options = parser.parse_args()
    lines = [
        "# Results",
        "",
        f"`make bench`, {datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, float32 GEMM {gemm_rate():.0f} GFLOP/s in the same run.",
        "Medians (and minima) of interleaved runs, in seconds; numbers of both agree as stated.",
        "",
        "| workload | cells x pairs | hooks by hand | causalpatch (reference engine) | ratio | largest difference |",
        "|---|---|---|---|---|---|",
    ]
    for workload in workloads(quick=options.quick):
        ours, hand = workload.ours(), workload.by_hand()
        difference = float(np.abs(ours - hand).max())
        if difference > 1e-3:
            raise SystemExit(f"{workload.name}: the numbers differ by {difference}")
        times: dict[str, list[float]] = {"ours": [], "hand": []}
        for _ in range(options.repeats):
            for name, run in (("ours", workload.ours), ("hand", workload.by_hand)):
                started = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - started)
        mid, low = ({name: f(t) for name, t in times.items()} for f in (statistics.median, min))
        lines.append(
            f"| {workload.name} | {ours[..., 0].size} x {ours.shape[-1]} | {mid['hand']:.2f} ({low['hand']:.2f}) "
            f"| {mid['ours']:.2f} ({low['ours']:.2f}) | {mid['hand'] / mid['ours']:.2f} | {difference:.0e} |"
        )
        print(lines[-1])
    lines += ["", "Start-up, smallest of five processes, in seconds:", "", "| what | seconds |", "|---|---|"]
    lines += [f"| `{name}` | {seconds:.2f} |" for name, seconds in start_up()]
    lines += [
        "",
        "The reference engine makes full forwards with plain hooks and is the oracle for faster engines: what it saves "
        "is the overhead of many small forwards.",
        "",
    ]
    (ROOT / "benchmarks" / "RESULTS.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
