"""A stand-in for vLLM's engine: steps over a paged cache, and attention of one layer that is a dense oracle.

The two classes below have the interfaces of vLLM's metadata builder and attention implementation.
"""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

LAYOUTS = ("pair first", "pages first", "heads first")
PAGE, NUM_PAGES = 16, 128


@dataclasses.dataclass
class StepMetadata:
    """What vLLM's runner says of a step: the fields of its CommonAttentionMetadata that matter, and a rare one."""

    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Tensor
    slot_mapping: Tensor
    causal: Any = True
    positions: Tensor | None = None
    is_prefilling: Tensor | None = None
    seq_lens_cpu_upper_bound: Tensor | None = None
    req_idx: Any = None
    rswa_prefix_lens: Tensor | None = None
    _num_computed_tokens_cache: Tensor | None = None

    def replace(self, **changes: Any) -> StepMetadata:
        return dataclasses.replace(self, **changes)


class DenseBuilder:
    """As vLLM's builder; ``fast_builds`` counts those without a schedule ahead of time."""

    fast_builds = 0

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        self.fast_builds += fast_build
        return SimpleNamespace(
            query_start_loc=common_attn_metadata.query_start_loc,
            seq_lens=common_attn_metadata.seq_lens,
            block_table=common_attn_metadata.block_table_tensor,
        )


class DenseImpl:
    """As vLLM's FlashAttentionImpl, in float64; ``seen`` notes how many tokens each call had."""

    def __init__(self, layout: str = "heads first", **changes: Any) -> None:
        self.num_heads, self.num_kv_heads, self.head_size, self.scale = 4, 2, 16, 0.3
        self.attn_type, self.kv_cache_dtype, self.kv_sharing_target_layer_name = "decoder", "auto", None
        self.sliding_window, self.logits_soft_cap, self.sinks, self.alibi_slopes = (-1, -1), 0, None, None
        self.layout, self.seen = layout, list[int]()
        for name, value in changes.items():
            setattr(self, name, value)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        del layer, key, value, output_scale, output_block_scale
        if attn_metadata is None:
            return output.zero_()
        self.seen.append(len(query))
        starts, lengths = attn_metadata.query_start_loc.tolist(), attn_metadata.seq_lens.tolist()
        for row, (start, end, length) in enumerate(zip(starts, starts[1:], lengths, strict=False)):
            if end > start:
                keys, values = read_pages(kv_cache, self.layout, attn_metadata.block_table[row], length)
                output[start:end] = attend(query[start:end], keys, values, self)
        return output


def attend(query: Tensor, key: Tensor, value: Tensor, impl: Any) -> Tensor:
    """Attend in float64, the queries being the last tokens: (Sq, H, D) and (Skv, Hkv, D) to (Sq, H, D)."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (query, key, value))
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    scores = q @ k.transpose(-2, -1) * impl.scale
    if impl.logits_soft_cap:
        scores = impl.logits_soft_cap * torch.tanh(scores / impl.logits_soft_cap)
    distance = (torch.arange(len(query)) + len(key) - len(query)).unsqueeze(-1) - torch.arange(len(key))
    window = impl.sliding_window[0] if impl.sliding_window[0] >= 0 else math.inf
    scores = scores.masked_fill((distance < 0) | (distance > window), -torch.inf)
    if impl.sinks is not None:
        sinks = impl.sinks.double().view(-1, 1, 1).expand(-1, len(query), 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ v).transpose(0, 1).to(query.dtype)


# The paged cache


def make_cache(layout: str, num_kv_heads: int = 2, head_size: int = 16) -> Tensor:
    """Return a cache full of NaN: what is read beyond a prompt's own tokens would show."""
    shape = {
        "pair first": (2, NUM_PAGES, PAGE, num_kv_heads, head_size),
        "pages first": (NUM_PAGES, 2, PAGE, num_kv_heads, head_size),
        "heads first": (NUM_PAGES, num_kv_heads, PAGE, 2 * head_size),
    }[layout]
    return torch.full(shape, math.nan)


def find_slot(kv_cache: Tensor, layout: str, page: int, offset: int) -> tuple[Tensor, Tensor]:
    """Return the key and the value of one slot, (Hkv, D) each: views."""
    if layout == "pair first":
        return kv_cache[0, page, offset], kv_cache[1, page, offset]
    if layout == "pages first":
        return kv_cache[page, 0, offset], kv_cache[page, 1, offset]
    size = kv_cache.shape[-1] // 2
    return kv_cache[page, :, offset, :size], kv_cache[page, :, offset, size:]


def read_pages(kv_cache: Tensor, layout: str, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return a prompt's keys and values, (length, Hkv, D) each, slot by slot."""
    slots = [find_slot(kv_cache, layout, int(table[i // PAGE]), i % PAGE) for i in range(length)]
    return torch.stack([key for key, _ in slots]), torch.stack([value for _, value in slots])


# Steps


@dataclasses.dataclass
class Request:
    """A prompt of one layer.

    Attributes:
        query: (length, H, D).
        key: (length, Hkv, D).
        value: (length, Hkv, D).
        pages: (max_pages,) int32.
        prompt_length: Tokens of the prompt; later ones were generated.
        done: Tokens that are in the cache.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    pages: Tensor
    prompt_length: int
    done: int = 0


class Engine:
    """One layer's cache, and the requests of it."""

    def __init__(self, layout: str, impl: Any, builder: Any) -> None:
        self.layout, self.impl, self.builder = layout, impl, builder
        self.kv_cache = make_cache(layout, impl.num_kv_heads, impl.head_size)
        self.free = torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(0)).int()
        self.generator = torch.Generator().manual_seed(1)

    def add(self, prompt_length: int, generated: int = 2) -> Request:
        """Draw a request."""
        length = prompt_length + generated
        shapes = [(self.impl.num_heads,), (self.impl.num_kv_heads,), (self.impl.num_kv_heads,)]
        tensors = [torch.randn(length, *n, self.impl.head_size, generator=self.generator) for n in shapes]
        count = -(-length // PAGE)
        pages, self.free = self.free[:count], self.free[count:]
        assert len(pages) == count, "the cache is full"
        return Request(*tensors, torch.nn.functional.pad(pages, (0, 32 - count)), prompt_length)

    def describe(self, scheduled: list[tuple[Request, int]], padding: int = 0) -> StepMetadata:
        """Return a step's metadata; ``padding`` is rows without tokens."""
        counts = [count for _, count in scheduled] + [0] * padding
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        lengths = torch.tensor([r.done + count for r, count in scheduled] + [0] * padding).int()
        table = torch.stack([r.pages for r, _ in scheduled] + [torch.zeros(32).int()] * padding)
        are_prefilling = torch.tensor([r.done < r.prompt_length for r, _ in scheduled])
        slots = [
            int(r.pages[i // PAGE]) * PAGE + i % PAGE for r, count in scheduled for i in range(r.done, r.done + count)
        ]
        return StepMetadata(
            *(starts, starts.clone(), lengths, len(counts), int(starts[-1]), max(counts), int(lengths.max()), table),
            torch.tensor(slots),
            is_prefilling=are_prefilling,
            seq_lens_cpu_upper_bound=lengths.clone(),
        )

    def step(
        self, scheduled: list[tuple[Request, int]], *, padding: int = 0, has_keys: bool = True, **changes: Any
    ) -> list[Tensor]:
        """Run a step; return each request's output, (count, H, D).

        Args:
            scheduled: Requests, and how many tokens of each.
            padding: Rows without tokens.
            has_keys: Whether the layer has keys and values of its own, or shares another's cache.
            **changes: To the metadata.
        """
        metadata = self.describe(scheduled, padding).replace(**changes)
        spans = [(r, slice(r.done, r.done + count)) for r, count in scheduled]
        query, key, value = (
            torch.cat([getattr(r, name)[span] for r, span in spans]) for name in ("query", "key", "value")
        )
        for slot, k, v in zip(metadata.slot_mapping.tolist(), key, value, strict=True):
            own_key, own_value = find_slot(self.kv_cache, self.layout, slot // PAGE, slot % PAGE)
            own_key.copy_(k)
            own_value.copy_(v)
        output = torch.full_like(query, math.nan)
        layer = SimpleNamespace(layer_name="model.layers.3.self_attn.attn")
        own = self.builder.build(0, metadata)
        given = (key, value) if has_keys else (None, None)
        self.impl.forward(layer, query, *given, self.kv_cache, own, output)
        for request, count in scheduled:
            request.done += count
        return list(output.split([count for _, count in scheduled]))

    def expect(self, request: Request, first: int, end: int) -> Tensor:
        """Return dense attention of a stretch of a request's tokens."""
        return attend(request.query[first:end], request.key[:end], request.value[:end], self.impl)
