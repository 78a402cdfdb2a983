"""Tiny models whose attention is sharp enough to lose something, for the tests of the audit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

LENGTH = 200
BLOCK = 16
OPTIONS: dict[str, Any] = {"estimator": "flexprefill", "block_size": BLOCK, "min_budget": 0, "gamma": 0.7}
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,  # at the default, attention is nearly uniform and tells little
}


def llama(**sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | sizes)).eval()


def gemma() -> nn.Module:
    """Softcapped scores, and a window of 70 in the first layer."""
    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(**SIZES, sliding_window=70, attn_logit_softcapping=2.0, attn_implementation="eager")
    ).eval()


def tokens(batch: int = 1, length: int = LENGTH) -> Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(1))
