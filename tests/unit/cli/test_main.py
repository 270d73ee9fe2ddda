"""The program: what commands print and write, and how errors leave it."""

import json
import re
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from causalpatch.cli.main import main
from causalpatch.engine import ENGINES, Screen
from causalpatch.results.effects import Effects
from causalpatch.testing.tiny import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    tiny_model("llama", seed=1, layers=2, dtype=torch.float32).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = []
    for k in range(12):
        clean = [k + 1, 20, 21, (3 * k + 5) % 38]
        rows.append(
            {"clean": clean, "corrupt": [k + 1, 22, 21, clean[3]], "answer": 4, "wrong_answer": 5, "kind": "ab"[k % 2]}
        )
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def run(capsys, *words):
    """Run the program and return its exit code, output and error stream."""
    code = 0
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def oriented(capsys, folder, pairs_file):
    """Return the direction-free options under which the random model has a gap that can be shared out."""
    code, out, _ = run(
        capsys, "sweep", folder, pairs_file, "--site", "logits@-1", "--metric", "kl_divergence", "--json"
    )
    assert code == 0
    return json.loads(out)


def test_help_lists_the_commands(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(command in out for command in ("demo", "sweep", "trace", "lens", "doctor", "tasks", "show"))


def test_the_version_is_printed(capsys):
    assert run(capsys, "--version")[1].startswith("causalpatch 0.")


def test_help_answers_within_half_a_second():
    # The smallest of five processes; the machine may be busy, so up to three rounds.
    for _ in range(3):
        times = []
        for _ in range(5):
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", "from causalpatch.cli.main import main; main(['--help'])"],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            times.append(time.perf_counter() - started)
        if min(times) < 0.5:
            return
    pytest.fail(f"the fastest of fifteen runs of --help took {min(times):.2f} s")


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom causalpatch.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'xarray', 'pandas', 'altair', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_doctor_prints_every_site_with_its_proofs(capsys, folder):
    code, out, _ = run(capsys, "doctor", folder)
    assert code == 0
    assert "resid_mid" in out
    assert "identity, edit, whole, algebra" in out
    assert "21 sites can be patched, 10 are refused" in out


def test_doctor_says_why_a_site_is_refused(capsys, tmp_path):
    tiny_model("gpt_neox", seed=1, dtype=torch.float32).save_pretrained(tmp_path)
    code, out, _ = run(capsys, "doctor", tmp_path, "--json")
    found = {row["site"]: row for row in json.loads(out)["sites"]}
    assert code == 0
    assert "parallel" in found["resid_mid"]["refused"]
    assert found["resid_post"]["passed"] == ["identity", "edit", "whole", "algebra"]


def test_sweep_writes_numbers_tables_and_pictures(capsys, folder, pairs_file, tmp_path):
    out_folder = tmp_path / "out"
    words = ("--site", "z", "--metric", "kl_divergence", "--out", out_folder, "--top", 3)
    code, out, _ = run(capsys, "sweep", folder, pairs_file, *words)
    assert code == 0
    assert "exploratory: the 3 largest of 8 cells" in out
    written = {path.name for path in out_folder.iterdir()}
    assert {"manifest.json", "summary.csv", "heat.svg", "heat.png", "heat.html", "bars.png"} <= written
    effects = Effects.load(out_folder)
    assert effects.dims == ("layer", "head", "pair")
    assert effects.provenance["site"] == "z.*.*"
    code, shown, _ = run(capsys, "show", out_folder, "--top", 3)
    assert code == 0
    assert "the 3 largest of 8 cells" in shown
    code, shown, _ = run(capsys, "show", out_folder, "--all", "--json")
    assert len(json.loads(shown)["cells"]["kl_divergence"]) == 8


def test_sweep_prints_one_json_object(capsys, folder, pairs_file):
    found = oriented(capsys, folder, pairs_file)
    assert list(found["sweeps"]) == ["logits@-1"]
    cell = found["sweeps"]["logits@-1"]["cells"]["kl_divergence"][0]
    assert cell["recovered"] == pytest.approx(1.0, abs=1e-4)
    assert found["sweeps"]["logits@-1"]["provenance"]["direction"] == "denoise"


def test_several_sites_get_a_folder_each(capsys, folder, pairs_file, tmp_path):
    words = ("--site", "z@-1", "--site", "attn_out@-1", "--metric", "kl_divergence", "--out", tmp_path)
    assert run(capsys, "sweep", folder, pairs_file, *words)[0] == 0
    assert (tmp_path / "z@-1" / "manifest.json").exists()
    assert (tmp_path / "attn_out@-1" / "manifest.json").exists()


def test_several_metrics_are_shown_and_written_each(capsys, folder, pairs_file, tmp_path):
    words = ("--site", "z@-1", "--metric", "kl_divergence", "--metric", "kl_from_base", "--out", tmp_path, "--top", 2)
    code, out, _ = run(capsys, "sweep", folder, pairs_file, *words)
    assert code == 0
    assert "z@-1, kl_divergence" in out
    assert "z@-1, kl_from_base" in out
    assert {"summary-kl_divergence.csv", "heat-kl_from_base.png"} <= {path.name for path in tmp_path.iterdir()}
    code, out, _ = run(capsys, "sweep", folder, pairs_file, *words, "--json")
    assert list(json.loads(out)["sweeps"]["z@-1"]["cells"]) == ["kl_divergence", "kl_from_base"]


def test_ablations_take_the_clean_run_apart_unless_told_otherwise(capsys, folder, pairs_file):
    words = ("--site", "z", "--value", "zero", "--metric", "answer_logit")
    code, out, err = run(capsys, "sweep", folder, pairs_file, *words, "--json")
    assert code in (0, 4)  # a random model need not have a gap, but the direction is noise
    assert 'direction="noise"' not in out + err
    code, _, err = run(capsys, "sweep", folder, pairs_file, *words, "--direction", "denoise")
    assert code == 4
    assert 'direction="noise"' in err


@pytest.mark.filterwarnings("default::causalpatch.base.errors.CausalPatchWarning")
@pytest.mark.parametrize(
    ("value", "direction"),
    [("interpolate(0.5)", "denoise"), ("resample(seed=1)", "noise"), ("noise(0.1)", "noise"), ("0.5", "noise")],
)
def test_values_are_spelt_as_text(capsys, folder, pairs_file, value, direction):
    words = ("--site", "z@-1", "--value", value, "--metric", "kl_from_base", "--json")
    code, out, _ = run(capsys, "sweep", folder, pairs_file, *words)
    assert code == 0
    assert json.loads(out)["sweeps"]["z@-1"]["provenance"]["direction"] == direction


def test_a_steering_vector_comes_from_a_file(capsys, folder, pairs_file, tmp_path):
    np.savez(tmp_path / "vectors.npz", truth=np.ones(32))
    words = (
        "--site",
        "resid_pre@-1",
        "--value",
        f"steer({tmp_path}/vectors.npz:truth, -2)",
        "--metric",
        "kl_from_base",
    )
    code, out, _ = run(capsys, "sweep", folder, pairs_file, *words, "--json")
    assert code == 0
    assert "steering by -2" in json.loads(out)["sweeps"]["resid_pre@-1"]["provenance"]["value"]


def test_several_draws_are_averaged_for_tables_and_kept_on_disk(capsys, folder, pairs_file, tmp_path):
    words = ("--site", "resid_pre@-1", "--value", "noise", "--draws", 2, "--metric", "kl_from_base", "--out", tmp_path)
    code, out, _ = run(capsys, "sweep", folder, pairs_file, *words)
    assert code == 0
    assert "the 2 largest of 2 cells" in out
    assert "mean over 2 draws" in out
    assert Effects.load(tmp_path).dims == ("layer", "draw", "pair")
    assert run(capsys, "show", tmp_path)[0] == 0


def test_windows_slide_and_are_planned(capsys, folder, pairs_file):
    words = ("--site", "mlp_out@-1", "--window", 2, "--metric", "kl_divergence")
    code, out, _ = run(capsys, "sweep", folder, pairs_file, *words, "--json")
    assert code == 0
    assert json.loads(out)["sweeps"]["mlp_out@-1"]["provenance"]["site"] == "mlp_out.*@-1 in windows of 2"
    code, out, _ = run(capsys, "sweep", folder, pairs_file, *words, "--plan")
    assert code == 0
    assert "2 on 12 pairs" in out


def test_a_trace_writes_effects_and_one_figure(capsys, tmp_path):
    words = ("--where", "template=near", "--span", "subject", "--kind", "mlp", "--draws", 2, "--window", 2)
    code, out, _ = run(capsys, "trace", "zoo:stories", "agreement", *words, "--device", "cpu", "--out", tmp_path)
    assert code == 0
    assert "noise mlp" in out
    assert "all in one figure" in out
    written = {path.name for path in tmp_path.iterdir()}
    assert {"trace.svg", "trace.png", "noise-mlp", "pairs-mlp"} <= written
    assert Effects.load(tmp_path / "noise-mlp").dims == ("layer", "position", "draw", "pair")


def test_a_trace_names_the_spans_that_there_are(capsys):
    code, _, err = run(capsys, "trace", "zoo:stories", "ioi", "--device", "cpu")
    assert code == 2
    assert "has no span 'subject'" in err


@pytest.mark.filterwarnings("ignore")
def test_the_source_model_may_be_an_adapter_s_folder(capsys, folder, pairs_file, tmp_path):
    adapted = get_peft_model(
        LlamaForCausalLM.from_pretrained(folder),
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    capsys.readouterr()
    effects = {}
    for name in ("adapter", "merged"):
        words = (
            "--site",
            "mlp_out@-1",
            "--over",
            "layer",
            "--metric",
            "kl_divergence",
            "--source-model",
            tmp_path / name,
        )
        code, out, _ = run(capsys, "sweep", folder, pairs_file, *words, "--device", "cpu", "--json")
        assert code == 0
        sweep = json.loads(out)["sweeps"]["mlp_out@-1"]
        assert sweep["provenance"]["source_model"]["name"] == str(tmp_path / name)
        effects[name] = {cell["layer"]: cell["effect"] for cell in sweep["cells"]["kl_divergence"]}
    assert effects["adapter"] == pytest.approx(effects["merged"], rel=1e-3, abs=1e-5)
    assert max(map(abs, effects["adapter"].values())) > 1e-3


@pytest.mark.filterwarnings("default::causalpatch.base.errors.CausalPatchWarning")
def test_stopping_keeps_what_was_measured_and_leaves_with_130(capsys, folder, pairs_file, monkeypatch):
    made = []

    def stop_after_some(self, *args, **kwargs):
        made.append(1)
        if len(made) == 125:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    forward = LlamaForCausalLM.forward
    monkeypatch.setattr(LlamaForCausalLM, "forward", stop_after_some)
    monkeypatch.setattr("causalpatch.engine.memory.CPU_TOKENS", 4)  # one prompt in a forward
    words = ("--site", "logits@-1", "--site", "z", "--site", "attn_out", "--metric", "kl_divergence", "--json")
    code, out, err = run(capsys, "sweep", folder, pairs_file, *words, "--engine", "rows")
    assert code == 130
    assert "runs were made and are kept" in err
    sweeps = json.loads(out)["sweeps"]
    assert list(sweeps) == ["logits@-1", "z"]
    assert sweeps["z"]["provenance"]["complete"] is False


def test_sweep_offers_every_engine(capsys, folder, pairs_file):
    code, _, err = run(capsys, "sweep", folder, pairs_file, "--engine", "fast")
    assert code == 2
    assert ", ".join(map(repr, ENGINES)) in err


def test_sweep_says_which_engine_made_the_runs_and_all_give_the_same_numbers(capsys, folder, pairs_file):
    words = ("--site", "z@-1", "--metric", "kl_divergence")
    code, out, _ = run(capsys, "sweep", folder, pairs_file, *words)
    assert code == 0
    assert "\nengine wavefront: rows of tokens that can have changed\n" in out
    found = {}
    for engine in ("auto", "restart", "rows"):
        code, out, _ = run(capsys, "sweep", folder, pairs_file, *words, "--engine", engine, "--json")
        assert code == 0
        found[engine] = json.loads(out)["sweeps"]["z@-1"]
        cells = sorted(
            (cell["layer"], cell["head"], cell["effect"]) for cell in found[engine]["cells"]["kl_divergence"]
        )
        found[engine]["effects"] = [effect for _, _, effect in cells]
    made = {engine: one["provenance"]["engine"]["tier"] for engine, one in found.items()}
    assert made == {"auto": "wavefront", "restart": "restart", "rows": "rows"}
    for one in found.values():
        assert one["effects"] == pytest.approx(found["rows"]["effects"], rel=1e-4, abs=1e-5)


def test_an_engine_that_cannot_make_the_runs_is_an_error_not_another_engine(capsys, folder, pairs_file):
    code, out, err = run(
        capsys, "sweep", folder, pairs_file, "--site", "module(lm_head).output", "--engine", "wavefront"
    )
    assert (code, out) == (2, "")
    assert "stands outside the layers" in err


def test_sweep_screens_where_it_is_told_to_and_says_why_nothing_was_screened(capsys, folder, pairs_file):
    words = ("sweep", folder, pairs_file, "--site", "z@-1", "--metric", "kl_divergence")
    code, out, _ = run(capsys, *words, "--precision", "screen")
    assert code == 0
    small = "no linear map of the layers has 131,072 weights, and smaller ones gain nothing"
    assert f"note: measured in float32, not screened: {small}" in out
    records = {}
    for precision in (None, "float32", "screen"):
        asked = ("--precision", precision) if precision else ()
        code, out, _ = run(capsys, *words, *asked, "--json")
        assert code == 0
        records[precision] = json.loads(out)["sweeps"]["z@-1"]["provenance"]["precision"]
    assert records[None] == {"asked": "as the model is", "product": "float32"}
    assert records["float32"] == {"asked": "float32", "product": "float32"}
    assert records["screen"] == {"asked": "screen", "product": "float32", "reason": small}
    code, out, _ = run(capsys, *words, "--precision", "screen", "--plan")
    assert code == 0
    assert f"screen         none, all in float32: {small}" in out


def test_a_sweep_that_is_screened_says_how_many_cells_and_how_noisy_they_are(capsys, folder, pairs_file, monkeypatch):
    screen = partial(Screen, n_sample=1, min_weights=0, product="bf16")
    monkeypatch.setattr("causalpatch.experiment.experiment.Screen", lambda top_k, seed: screen(1, seed))
    words = ("sweep", folder, pairs_file, "--site", "z", "--metric", "kl_divergence", "--precision", "screen")
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert re.search(r"note: \d of 8 cells screened in bf16: noise up to about \S+ in kl_divergence", out)
    code, out, _ = run(capsys, *words, "--plan")
    assert code == 0
    assert "screen         all 8 in bf16 first\n" in out
    code, out, _ = run(capsys, *words, "--plan", "--json")
    assert json.loads(out)["plans"]["z"]["screen"]["choice"]["n_sample"] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--precision", "half"), "'float32', 'screen'"),
        (("--precision", "screen", "--engine", "rows"), 'precision="screen" needs the wavefront engine'),
        (("--precision", "screen", "--dtype", "bfloat16"), "needs a model in float32"),
        (("--precision", "screen", "--site", "module(lm_head).output"), "stands outside the layers"),
        (("--precision", "screen", "--site", "module(lm_head).output", "--plan"), "stands outside the layers"),
    ],
)
def test_a_screen_that_cannot_be_made_is_an_error_and_nothing_is_measured(capsys, folder, pairs_file, words, said):
    code, out, err = run(capsys, "sweep", folder, pairs_file, *words)
    assert (code, out) == (2, "")
    assert said in err
    assert "fix:" in err


def test_a_small_memory_budget_makes_smaller_batches(capsys, folder, pairs_file):
    made = {}
    for budget in ("1", "0.00001"):
        words = ("--site", "z@-1", "--metric", "kl_divergence", "--budget-gib", budget, "--json")
        code, out, _ = run(capsys, "sweep", folder, pairs_file, *words)
        assert code == 0
        made[budget] = json.loads(out)["sweeps"]["z@-1"]["provenance"]["cost"]["forwards"]
    assert made["0.00001"] > made["1"]


def test_pairs_are_kept_by_column_and_number(capsys, folder, pairs_file):
    words = ("--site", "z@-1", "--metric", "kl_divergence", "--where", "kind=a", "--first", 4, "--json")
    code, out, _ = run(capsys, "sweep", folder, pairs_file, *words)
    assert code == 0
    assert json.loads(out)["sweeps"]["z@-1"]["provenance"]["pairs"]["n"] == 4


def test_frozen_sites_keep_their_values_in_every_run_and_in_plans(capsys, folder, pairs_file):
    words = ("sweep", folder, pairs_file, "--site", "resid_pre.0@1", "--metric", "kl_from_base", "--over", "layer")
    found = []
    for frozen in ((), ("--frozen", "resid_post.1"), ("--frozen", "attn_out.1", "--frozen", "mlp_out.1")):
        code, out, _ = run(capsys, *words, *frozen, "--json")
        assert code == 0
        found.append(abs(json.loads(out)["sweeps"]["resid_pre.0@1"]["cells"]["kl_from_base"][0]["effect"]))
    free, all_kept, some_kept = found
    assert all_kept < 1e-6 < some_kept
    assert some_kept != pytest.approx(free, rel=1e-3)
    assert run(capsys, *words, "--frozen", "resid_post.1", "--plan")[0] == 0
    assert run(capsys, *words, "--frozen", "router")[0] == 3


def test_the_lens_stands_beside_a_sweep_in_tables_json_and_one_figure(capsys, folder, pairs_file, tmp_path):
    words = ("lens", folder, pairs_file, "--metric", "kl_from_base", "--device", "cpu")
    code, out, _ = run(capsys, *words, "--top", 3, "--out", tmp_path)
    assert code == 0
    assert "logit lens, kl_from_base behind each layer: no causal evidence" in out
    whole = re.search(r"note: means over pairs; all 14 senders add up to (\S+)", out)[1]
    assert {"beside.svg", "beside.png", "beside.csv", "manifest.json"} <= {path.name for path in tmp_path.iterdir()}
    assert Effects.load(tmp_path).dims == ("layer", "head", "pair")
    code, out, _ = run(capsys, *words, "--by", "layer", "--json")
    found = json.loads(out)
    assert code == 0
    assert [row["layer"] for row in found["lens"]] == [0, 1]
    assert found["lens"][1]["clean"] == pytest.approx(0.0, abs=1e-5)  # behind the last layer stands the run itself
    assert found["lens"][0]["clean"] > 1e-3
    senders = ["resid_pre.0", "attn_out.0", "mlp_out.0", "attn_out.1", "mlp_out.1", "constant"]
    assert [row["sender"] for row in found["attribution"]] == senders
    assert sum(row["logits"] for row in found["attribution"]) == pytest.approx(float(whole), abs=1e-3)
    assert list(found["sweeps"]) == ["z@-1"]


def test_a_plan_costs_nothing_and_says_what_a_sweep_would(capsys, folder, pairs_file):
    code, out, _ = run(capsys, "sweep", folder, pairs_file, "--site", "z", "--plan")
    assert code == 0
    assert "8 on 12 pairs" in out
    code, out, _ = run(capsys, "sweep", folder, pairs_file, "--site", "z", "--plan", "--json")
    assert json.loads(out)["plans"]["z"]["rows"] == 8 * 12 + 3 * 12


def test_tasks_are_listed_and_shown(capsys):
    code, out, _ = run(capsys, "tasks", "--json")
    assert code == 0
    assert {"ioi", "induction", "agreement", "greater_than"} <= {task["task"] for task in json.loads(out)["tasks"]}
    code, out, _ = run(capsys, "tasks", "ioi", "--count", 2, "--json")
    assert len(json.loads(out)["pairs"]) == 2


@pytest.mark.parametrize(
    ("words", "code", "kind"),
    [
        (("sweep", "{folder}", "{pairs}", "--site", "z.9"), 2, "SiteNotFound"),
        (("sweep", "{folder}", "{pairs}", "--metric", "accuracy"), 2, "MetricError"),
        (("sweep", "{folder}", "{pairs}", "--where", "kind"), 2, "SettingError"),
        (("sweep", "{folder}", "nothing.jsonl"), 2, "PairFileError"),
        (("doctor", "{pairs}"), 2, "ModelNotFound"),
        (("show", "{folder}"), 2, "ResultsNotFound"),
        (("tasks", "ioj"), 2, "TaskNotFound"),
    ],
)
def test_errors_leave_by_their_branch_with_a_fix(capsys, folder, pairs_file, words, code, kind):
    words = [word.format(folder=folder, pairs=pairs_file) for word in words]
    found, out, err = run(capsys, *words)
    assert (found, out) == (code, "")
    assert err.startswith(f"{kind}: ")
    found, out, err = run(capsys, *words, "--json")
    assert json.loads(out)["error"]["kind"] == kind
    assert (found, err) == (code, "")


def test_an_unsupported_site_leaves_with_3(capsys, pairs_file, tmp_path):
    tiny_model("gpt_neox", seed=1, dtype=torch.float32).save_pretrained(tmp_path)
    capsys.readouterr()  # saving shows a bar
    code, _, err = run(capsys, "sweep", tmp_path, pairs_file, "--site", "resid_mid")
    assert code == 3
    assert err.startswith("SiteUnsupported: ")


def test_a_missing_gap_leaves_with_4(capsys, folder, tmp_path):
    path = tmp_path / "same.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"clean": [k, 2, 3], "corrupt": [k, 2, 3], "answer": 1, "wrong_answer": 2}) for k in range(3)
        )
    )
    code, _, err = run(capsys, "sweep", folder, path, "--site", "z")
    assert code == 4
    assert err.startswith("NoGap: ")


def test_a_mistyped_option_leaves_with_2(capsys):
    code, _, err = run(capsys, "sweep", "--nonsense")
    assert code == 2
    assert "nonsense" in err


def test_paths_prints_and_saves_edges_and_sets_of_paths(capsys, folder, pairs_file, tmp_path):
    asked = ("paths", folder, pairs_file, "--metric", "kl_divergence", "--direction", "noise")
    ends = ("--senders", "head_out.0", "--receivers", "q.1.0 + k.1.0", "--receivers", "logits", "--json")
    code, out, _ = run(capsys, *asked, *ends, "--out", tmp_path)
    assert code == 0
    assert Effects.load(tmp_path).to_xarray()["receiver"].values.tolist() == ["q.1.0 + k.1.0", "logits"]
    assert any(name.endswith("heat.svg") for name in json.loads(out)["sweeps"]["paths"]["files"])
    code, out, _ = run(capsys, *asked, "--path", "embed -> q.0.1 -> logits + embed -> logits", "--json")
    assert code == 0
    cells = json.loads(out)["sweeps"]["paths"]
    assert "embed -> q.0.1 -> logits + embed -> logits" in json.dumps(cells)
    code, _, err = run(capsys, *asked, "--senders", "head_out.1.0", "--receivers", "q.1.0")
    assert code == 2
    assert "nothing goes from 'head_out.1.0' to 'q.1.0'" in err


@pytest.fixture(scope="module")
def two_streams(tmp_path_factory):
    place = tmp_path_factory.mktemp("encoder-decoder")
    tiny_model("t5", seed=1, layers=1, heads=2, dtype=torch.float32).save_pretrained(place)
    return place


def test_doctor_lists_the_sites_of_both_streams(capsys, two_streams):
    code, out, _ = run(capsys, "doctor", two_streams, "--json")
    assert code == 0
    found = {row["site"]: row for row in json.loads(out)["sites"]}
    assert found["encoder/z"]["shape"] == "1 x 2 x position x 8"
    assert found["decoder/z"]["shape"] == "2 x 2 x position x 8"
    assert found["cross_z"]["passed"] == ["identity", "edit", "algebra"]
    assert "bias of the scores" in found["encoder/pos_embed"]["refused"]


def test_a_sweep_of_either_stream_walks_along_its_tokens(capsys, two_streams, tmp_path):
    rows = [{"clean": [k + 3, 20, 21], "corrupt": [k + 3, 22, 23], "answer": 4, "wrong_answer": 5} for k in range(12)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    words = ("--site", "encoder/resid_pre", "--site", "cross_z", "--metric", "kl_divergence", "--json")
    code, out, err = run(capsys, "sweep", two_streams, file, *words)
    assert (code, err) == (0, "")
    cells = json.loads(out)["sweeps"]
    assert list(cells) == ["encoder/resid_pre", "cross_z"]
    code, out, _ = run(capsys, "sweep", two_streams, file, "--site", "resid_pre", "--json")
    assert code == 2
    assert json.loads(out)["error"]["fix"] == "write 'encoder/resid_pre.*' or 'decoder/resid_pre.*'"
