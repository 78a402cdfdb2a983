"""The attention implementation "flexprefill" of transformers: sparse prefill for models that are not compiled.

mask function       what a layer may see       ->  None for causal, or the mask's formula: no S x S tensor
attention function  query, key, value, mask    ->  one compiled graph for each kind of layer, or dense attention
"""

from transformers import AttentionInterface, AttentionMaskInterface

from .attention import attend, read_report
from .masks import defer_mask

__all__ = ["read_report", "register"]

NAME = "flexprefill"


def register() -> None:
    """Register the attention function and its mask function."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, defer_mask)
