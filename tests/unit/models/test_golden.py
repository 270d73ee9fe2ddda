"""Sites of nano-sort-gpt2 against activations that its origin recorded with code of its own."""

import base64
import json

import numpy as np
import pytest
import torch

from causalpatch.models import open_model

HEADS = range(3)
GOLDEN = {
    "x": ["resid_pre.0"],
    "q": [f"q.0.{head}" for head in HEADS],
    "k": [f"k.0.{head}" for head in HEADS],
    "v": [f"v.0.{head}" for head in HEADS],
    "y": [f"z.0.{head}" for head in HEADS],
    "yProj": ["attn_out.0"],
    "attnResid": ["resid_mid.0"],
    "gelu": [f"mlp_post.0.{neuron}" for neuron in range(192)],
    "mlp": ["mlp_out.0"],
    "mlpResid": ["resid_post.0"],
    "block0": ["resid_post.0"],
    "block1": ["resid_post.1"],
    "block2": ["resid_post.2"],
    "ln_f": ["final_norm"],
    "lm_head": ["logits"],
    "tok_emb": ["embed"],
}


def golden(shared, name):
    record = json.loads((shared / "models" / "nano-sort-gpt2" / "golden_activations.json").read_text())[name]
    return torch.tensor(np.frombuffer(base64.b64decode(record["data"]), np.float32).reshape(record["shape"]))


@pytest.mark.parametrize("name", GOLDEN)
def test_sites_equal_what_the_origin_of_the_weights_recorded(shared, probe_of, name):
    module = open_model(shared / "models" / "nano-sort-gpt2", device="cpu").module.eval()
    *values, _ = probe_of(module, golden(shared, "idx").long()).read(*GOLDEN[name])
    wanted = golden(shared, name)
    if name in "qkv":  # axes (row, head, position, head_width)
        found = torch.stack(values, 1)
    elif name == "gelu":
        found = torch.stack(values, -1)
    else:
        found = torch.cat(values, -1)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 1e-5
