"""TransformerLens: its bridge on the same module, and its own sweep functions' common core.

``patching.get_act_patch_*`` are ``generic_activation_patch`` with a setter and an activation's name; the same call with
a table of cells sweeps a part of them. One forward per cell, logits at all positions.
"""

import tempfile
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformer_lens import TransformerBridge, patching
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from benchmarks.tasks import Cell, Task


class Lens:
    """Patches by TransformerLens."""

    def __init__(self, module: nn.Module) -> None:
        tokenizer = _tokenizer(module.config.vocab_size)
        self.bridge = TransformerBridge.boot_transformers("gpt2", hf_model=module, tokenizer=tokenizer, device="cpu")
        self.bridge.eval()
        self.cache: dict[str, Tensor] = {}

    @torch.no_grad()
    def capture(self, task: Task) -> None:
        _, self.cache = self.bridge.run_with_cache(task.clean)

    @torch.no_grad()
    def patch(self, task: Task, cells: Sequence[Cell]) -> np.ndarray:
        setter, activation, unit = {
            "resid_pre": (patching.layer_pos_patch_setter, "resid_pre", "pos"),
            "mlp_out": (patching.layer_pos_patch_setter, "mlp_out", "pos"),
            "z": (patching.layer_head_vector_patch_setter, "z", "head"),
            "neuron": (_set_neuron, "post", "neuron"),
        }[task.kind]
        table = pd.DataFrame(cells, columns=["layer", unit])
        found = patching.generic_activation_patch(
            self.bridge,
            task.corrupt,
            self.cache,
            lambda logits: task.read(logits[:, -1]).mean(),
            setter,
            activation,
            index_df=table,
        )
        return found.numpy()


def _set_neuron(corrupted: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    """One neuron at the last position: the library has setters for positions and heads."""
    corrupted[:, -1, index[1]] = clean[:, -1, index[1]]
    return corrupted


def _tokenizer(n_vocab: int) -> PreTrainedTokenizerBase:
    """Return a tokenizer that the bridge asks for; nothing is tokenized here."""
    end = "<|endoftext|>"
    words = {f"w{number}": number for number in range(n_vocab - 1)} | {end: n_vocab - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=end))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), end)
    with tempfile.TemporaryDirectory() as folder:
        # Saved and read again: the bridge looks where a tokenizer came from.
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder, add_bos_token=True)
