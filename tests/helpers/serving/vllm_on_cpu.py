"""vLLM's own FlashAttention backend on a CPU: its kernels replaced by plain torch code, all else as it is.

With a CPU build of vLLM the engine, its scheduler and its paged cache run for real, and so does the backend.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor


@contextlib.contextmanager
def flash_attention_on_cpu(backend: str) -> Iterator[None]:
    """While active, vLLM takes a backend, by its path, for CPU_ATTN, and FlashAttention's kernels run in torch."""
    from vllm.plugins import load_general_plugins  # noqa: PLC0415, may not be installed
    from vllm.v1.attention import selector  # noqa: PLC0415
    from vllm.v1.attention.backends import flash_attn, registry  # noqa: PLC0415

    load_general_plugins()  # what they register is to outlast the patch below
    names = {
        "flash_attn_varlen_func": attend,
        "reshape_and_cache_flash": store,
        "get_flash_attn_version": lambda *args, **kwargs: 2,
    }
    overrides = mock.patch.dict(registry._ATTN_OVERRIDES, {registry.AttentionBackendEnum.CPU_ATTN: backend})
    patches = [mock.patch.object(flash_attn, name, kernel, create=True) for name, kernel in names.items()]
    with contextlib.ExitStack() as stack:
        for patch in (overrides, *patches):
            stack.enter_context(patch)
        selector._cached_get_attn_backend.cache_clear()
        yield
    selector._cached_get_attn_backend.cache_clear()


def store(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, *others: Any
) -> None:
    """Write keys and values, (tokens, Hkv, D) each, into their slots; slot -1 is none."""
    del others
    is_real = slot_mapping >= 0
    slots, count, page_size = slot_mapping[is_real], len(slot_mapping), key_cache.shape[1]
    key_cache[slots // page_size, slots % page_size] = key[:count][is_real]
    value_cache[slots // page_size, slots % page_size] = value[:count][is_real]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    block_table: Tensor,
    softmax_scale: float,
    *,
    causal: bool,
    window_size: Sequence[int] | None,
    softcap: float,
    alibi_slopes: Tensor | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> None:
    """Attend as flash_attn_varlen_func does over pages, (num_pages, page_size, Hkv, D) each."""
    assert causal
    assert alibi_slopes is None
    assert s_aux is None
    assert not others.get("mask_mod")
    starts, lengths = cu_seqlens_q.tolist(), seqused_k.tolist()
    left = math.inf if window_size is None or window_size[0] < 0 else window_size[0]
    for row, (start, end, length) in enumerate(zip(starts, starts[1:], lengths, strict=False)):
        if end > start:
            pages = block_table[row, : -(-length // k.shape[1])].long()
            keys, values = (x[pages].flatten(0, 1)[:length] for x in (k, v))
            out[start:end] = _attend_to_one(q[start:end], keys, values, softmax_scale, left, softcap)


def _attend_to_one(query: Tensor, key: Tensor, value: Tensor, scale: float, left: float, softcap: float) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    keys, values = (x.transpose(0, 1).repeat_interleave(groups, 0) for x in (key, value))
    scores = query.transpose(0, 1) @ keys.transpose(-2, -1) * scale
    scores = torch.tanh(scores / softcap) * softcap if softcap else scores
    distance = (torch.arange(len(query)) + len(key) - len(query)).unsqueeze(-1) - torch.arange(len(key))
    scores = scores.masked_fill((distance < 0) | (distance > left), -torch.inf)
    return (scores.softmax(-1) @ values).transpose(0, 1)
