"""A decoder of the GPT-2 architecture with nothing in it: every weight is zero, to be set by hand."""

from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel


def bare_gpt2(dtype: torch.dtype = torch.float64, **settings: Any) -> nn.Module:
    """Build the unmodified ``GPT2LMHeadModel`` of transformers with all parameters 0, in eval mode.

    The head is not tied to the embeddings.

    Args:
        dtype: The model's floating-point type.
        settings: Of ``GPT2Config``, by its names.

    Examples:
        >>> module = bare_gpt2(vocab_size=3, n_positions=4, n_embd=4, n_layer=1, n_head=2)
        >>> float(module(torch.tensor([[0, 1]])).logits.detach().abs().sum())
        0.0
    """
    config = GPT2Config(tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, **settings)
    with torch.random.fork_rng(devices=[]):
        module: nn.Module = GPT2LMHeadModel(config).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module.eval()
