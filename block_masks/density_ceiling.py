"""The ops of a ceiling on density: whether a selection is sparse enough, and dense attention where it is not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flexprefill_compile.ops import ATTEND_DENSELY, IS_SPARSE
from flexprefill_compile.torch_internals import attention_strides

from .layout import count_causal_blocks

# The fastest first: on an H200 cuDNN's kernel takes half the time of FlashAttention's.
_SDPA_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_FIRST_WITH_FAST_CUDNN = 9  # compute capability: Hopper


def _is_sparse(
    kv_num_blocks: Tensor, full_kv_num_blocks: Tensor, length: int, max_density: float, from_length: int
) -> Tensor:
    """Tell whether a selection computes few enough blocks to be worth it.

    One GPU sync, except for prompts shorter than ``from_length`` and while a CUDA graph is captured: both run sparse.

    Args:
        kv_num_blocks: (B, H, num_blocks) int32, blocks of each row on which the mask runs.
        full_kv_num_blocks: (B, H, num_blocks) int32, its other blocks.
        length: Of the prompt, in tokens.
        max_density: Share of the causal blocks of all heads that may be computed.
        from_length: In tokens.

    Returns:
        () bool on the CPU.
    """
    if length < from_length or (kv_num_blocks.is_cuda and torch.cuda.is_current_stream_capturing()):
        return torch.ones((), dtype=torch.bool)
    batch, heads, num_blocks = kv_num_blocks.shape
    num_causal = batch * heads * count_causal_blocks(num_blocks)
    # Row by row first: int32 holds that, and a sum into int64 copies its input.
    computed = (kv_num_blocks + full_kv_num_blocks).sum(-1, dtype=torch.int32).sum()
    return torch.tensor(computed.item() <= max_density * num_causal)


def _attend_densely(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend causally by the fastest dense kernel, laid out as FlexAttention's output.

    Args:
        query: (B, H, S, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        scale: Factor on the scores.
    """
    has_fast_cudnn = query.is_cuda and torch.cuda.get_device_capability(query.device)[0] >= _FIRST_WITH_FAST_CUDNN
    backends = _SDPA_BACKENDS if has_fast_cudnn else _SDPA_BACKENDS[1:]
    with sdpa_kernel(backends, set_priority=True):
        output = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    strides = attention_strides(output, query)
    if output.stride() == strides:
        return output
    return output.new_empty_strided(output.shape, strides).copy_(output)


torch.library.impl(IS_SPARSE, ("CPU", "CUDA"), _is_sparse)
torch.library.impl(ATTEND_DENSELY, ("CPU", "CUDA"), _attend_densely)
