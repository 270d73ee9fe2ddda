"""The benchmarks run where peers are missing or broken, and time nobody whose numbers differ.

Each runs in a process of its own: it changes what can be imported.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def run(program: str, *arguments: Path, path: Path | None = None) -> str:
    prefix = f"import sys; sys.path[:0] = [{str(ROOT)!r}{f', {str(path)!r}' if path else ''}]\n"
    words = [sys.executable, "-c", prefix + program, *map(str, arguments)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_missing_and_broken_peers_are_skipped_and_said_to_be(tmp_path: Path) -> None:
    broken = tmp_path / "packages" / "transformer_lens"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('made for another torch')")
    run(
        "sys.modules['nnsight'] = sys.modules['pyvene'] = None\n"
        "from benchmarks.run import main\n"
        "for name in ('resid_pre', 'z'):\n"
        "    main(['--tiny', '--repeats', '1', '--only', name, '--out', sys.argv[1]])\n",
        tmp_path / "out",
        path=broken.parent,
    )
    text = (tmp_path / "out" / "RESULTS.md").read_text(encoding="utf-8")
    assert "Skipped: **TransformerLens**: cannot be imported (RuntimeError: made for another torch)." in text
    assert "Skipped: **pyvene**: " in text
    table = text[text.index("## GPT-2") : text.index("## Other")]
    assert table.count("skipped: cannot be imported (RuntimeError: made for another torch)") == 2
    assert table.count("import of nnsight halted") == 4  # one cell a trace, and eight

    # The second run kept what the first had found.
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert sorted(results["workloads"]) == ["resid_pre", "z"]
    for record in results["workloads"].values():
        timed = [name for name, each in record["contenders"].items() if each["seconds"]]
        assert sorted(timed) == ["causalpatch", "hooks by hand, batched"]
        assert record["contenders"]["hooks by hand, batched"]["difference"] < 1e-6 < record["largest_effect"]
    assert "](speed.svg)" in text
    assert (tmp_path / "out" / "speed.svg").is_file()


def test_a_peer_that_differs_or_fails_is_not_timed() -> None:
    program = """
import json
from benchmarks.contest import Stable, hold
from benchmarks.peers import PEERS, Peer
from benchmarks.peers.hooks import Hooks
from benchmarks.shapes import SHAPES, build, tiny
from benchmarks.workloads import WORKLOADS

class Shifted(Hooks):
    def patch(self, task, cells):
        return super().patch(task, [(layer, (cell + 1) % task.n_along) for layer, cell in cells])

class Failing(Hooks):
    def patch(self, task, cells):
        raise ValueError("no such hook")

class Local(Peer):
    def problem(self):
        return None
    def open(self, module):
        return globals()[self.factory](module)

peers = [PEERS[0], Local("shifted", "", "Shifted"), Local("failing", "", "Failing")]
stable = Stable(build(tiny(SHAPES["gpt2"])))
print(json.dumps(hold(WORKLOADS["mlp_out"], stable, peers, 1, is_tiny=True)["contenders"]))
"""
    found = json.loads(run(program).splitlines()[-1])
    assert found["hooks by hand, batched"]["skipped"] == ""
    assert len(found["hooks by hand, batched"]["seconds"]) == 1
    assert found["shifted"]["skipped"].startswith("numbers differ by ")
    assert found["failing"]["skipped"] == "failed: ValueError: no such hook"
    assert found["shifted"]["seconds"] == found["failing"]["seconds"] == []


def test_every_mutant_breaks_a_line_that_is_there() -> None:
    run(
        "from benchmarks.mutants import MUTANTS, ROOT, find_line\n"
        "assert len(MUTANTS) > 40\n"
        "for mutant in MUTANTS:\n"
        "    find_line(ROOT / 'src' / 'causalpatch' / mutant.file, mutant)\n"
        "    assert mutant.broken != mutant.line\n"
    )
