"""Keys and values of one prompt out of vLLM's paged cache.

(2, num_pages, page_size, Hkv, D)    |
(num_pages, 2, page_size, Hkv, D)    |  ->  (num_pages, page_size, Hkv, D) each  ->  (1, Hkv, tokens, D) of one prompt
(num_pages, Hkv, page_size, 2 * D)   |
"""

from __future__ import annotations

import torch
from torch import Tensor


def split_cache(kv_cache: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """Return the keys and the values of a layer's cache, each (num_pages, page_size, Hkv, D): views.

    Args:
        kv_cache: In one of the layouts above, of any strides.
        head_size: D.

    Raises:
        ValueError: The layout is another one.
    """
    if kv_cache.dim() == 4 and kv_cache.shape[-1] == 2 * head_size:
        key, value = kv_cache.transpose(1, 2).split(head_size, dim=-1)
        return key, value
    if kv_cache.dim() == 5 and kv_cache.shape[-1] == head_size and 2 in kv_cache.shape[:2]:
        key, value = kv_cache.unbind(0 if kv_cache.shape[0] == 2 else 1)
        return key, value
    raise ValueError(f"the layout of vLLM's KV cache is unknown: {tuple(kv_cache.shape)} with heads of {head_size}")


def gather_pages(pages: Tensor, table: Tensor, first_token: int, end_token: int) -> Tensor:
    """Copy a stretch of a prompt's tokens out of its pages.

    Args:
        pages: (num_pages, page_size, Hkv, D), all prompts.
        table: (max_pages,) int32, where the prompt's pages are.
        first_token: First token of the stretch, at the start of a page.
        end_token: Its end.

    Returns:
        (1, Hkv, end_token - first_token, D), a token's heads side by side in memory.
    """
    page_size = pages.shape[1]
    own = table[first_token // page_size : -(-end_token // page_size)]
    tokens: Tensor = pages.index_select(0, own).flatten(0, 1)[: end_token - first_token]
    return as_one_batch(tokens)


def as_one_batch(tokens: Tensor) -> Tensor:
    """Return (tokens, H, D) as (1, H, tokens, D), a view."""
    return tokens.transpose(0, 1).unsqueeze(0)


def find_first_token(context: int, window: int | None, page_size: int) -> int:
    """Return the first token that a chunk's queries need, at the start of its page.

    Args:
        context: Tokens before the chunk.
        window: How many keys a query sees, its own among them; None is all before it.
        page_size: In tokens.
    """
    if window is None:
        return 0
    return max(0, context - window + 1) // page_size * page_size


def reserve(num_bytes: int, device: torch.device) -> None:
    """Allocate and free memory, so that vLLM's profiling run sees what gathered pages and a selection will take."""
    torch.empty(num_bytes, dtype=torch.uint8, device=device)
