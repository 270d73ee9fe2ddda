"""A sweep of a model whose weights do not fit into the memory of its process."""

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

SWEEP = """
    import ctypes, gc, resource, sys, threading, time
    import numpy as np
    import torch
    torch.set_num_threads(1)
    import causalpatch as cp

    folder, limit_mib, weights, out = sys.argv[1], float(sys.argv[2]), sys.argv[3], sys.argv[4]

    def status(name):
        line = next(line for line in open("/proc/self/status") if line.startswith(name + ":"))
        return int(line.split()[1]) / 1024

    def pairs():
        draw = np.random.default_rng(0)
        made = [cp.Pair(*draw.integers(1, 60, (2, 8)), ((5,),), ((9,),), id=str(n)) for n in range(4)]
        return cp.Pairs(made, name="random")

    def run(model, budget_gib):
        experiment = cp.Experiment(model, pairs(), budget_gib=budget_gib, show_progress=False)
        sweeps = {}
        for site in ("resid_pre", "z", "mlp_out"):
            effects = cp.sweep(experiment, site)
            sweeps[site] = effects.to_xarray()["metric"].values
            assert effects.provenance["engine"]["tier"] == "wavefront", effects.provenance["engine"]
        return sweeps

    # What a first run imports and sets up is no part of the model's memory.
    run(cp.open_model("zoo:stories", device="cpu"), 0.05) if limit_mib else None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # nor is what it has let go, which could be used again
    before, peak = status("RssAnon"), [0.0]

    def watch():
        while True:
            peak[0] = max(peak[0], status("RssAnon"))
            time.sleep(0.002)

    if limit_mib:
        data = int((status("VmData") + limit_mib) * 2**20)
        resource.setrlimit(resource.RLIMIT_DATA, (data, data))
        threading.stack_size(256 * 1024)
        threading.Thread(target=watch, daemon=True).start()
    try:
        how = {"weights": "disk", "memory_gib": limit_mib / 1024} if weights == "disk" else {}
        model = cp.open_model(folder, device="cpu", dtype="float32", **how)
        sweeps = run(model, float(sys.argv[5]))
    except (MemoryError, RuntimeError, cp.CausalPatchError) as error:
        print("refused:", error, error.__cause__)
        sys.exit(3)
    np.savez(out, **sweeps)
    print(f"peak {peak[0] - before:.0f} MiB above {before:.0f}")
"""
BUDGET_GIB = 0.02


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model of 12 layers of 12 MiB each: 151 MiB of weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=512, n_layer=12, n_head=8, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = GPT2LMHeadModel(config)
    for parameter in module.parameters():
        parameter.data.mul_(3.0) if parameter.ndim == 2 else None
    module.save_pretrained(folder)
    return folder


def sweep(folder, out, *, limit_mib, weights):
    command = [sys.executable, "-c", dedent(SWEEP), str(folder), str(limit_mib), weights, str(out), str(BUDGET_GIB)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell how much memory is used")
def test_a_model_larger_than_memory_is_swept_below_the_limit_with_the_numbers_of_the_whole_model(checkpoint, tmp_path):

    limit = 60
    code, said = sweep(checkpoint, tmp_path / "whole.npz", limit_mib=0, weights="whole")
    assert code == 0, said
    code, said = sweep(checkpoint, tmp_path / "none.npz", limit_mib=limit, weights="whole")
    assert code == 3, said  # the whole model does not fit
    assert "memory" in said
    code, said = sweep(checkpoint, tmp_path / "streamed.npz", limit_mib=limit, weights="disk")
    assert code == 0, said
    peak = float(said.partition("peak ")[2].split()[0])
    assert peak < limit, said
    wanted, got = np.load(tmp_path / "whole.npz"), np.load(tmp_path / "streamed.npz")
    assert set(got) == {"resid_pre", "z", "mlp_out"}
    for name in got:
        assert np.array_equal(got[name], wanted[name], equal_nan=True), name
