"""Blocks classified from intervals, against every pair of tokens and against torch's create_block_mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers.lifting.mask_graphs import (
    Mask,
    assert_exact,
    assert_sound,
    classify,
    classify_by_pairs,
    materialise,
    trace_mask,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import create_block_mask

from flexprefill_compile.block_masks.layout import AttentionSizes
from flexprefill_compile.block_masks.masks.intervals import BlockBounds, classify_blocks

BATCH, HEADS = 2, 2


class Case(NamedTuple):
    """The tensors and numbers that the terms of a mask use; query row 0 is key ``offset``."""

    sizes: AttentionSizes
    offset: Any
    window: int
    chunk: int
    left: Tensor  # (B, S) bool: padded on the left by any amount, perhaps all of it
    right: Tensor
    document: Tensor  # (B, S): each document in one piece, numbered in any order

    def captures(self) -> tuple[Any, ...]:
        return self.left, self.right, self.document


Term = Callable[..., Tensor]
TERMS: dict[str, Callable[[Case], Term]] = {
    "causal": lambda case: lambda b, h, q, k, *_: q + case.offset >= k,
    "window": lambda case: lambda b, h, q, k, *_: q + case.offset - k < case.window,
    "band": lambda case: lambda b, h, q, k, *_: (q + case.offset - k).abs() < case.window,
    "chunk": lambda case: lambda b, h, q, k, *_: (q + case.offset) // case.chunk == k // case.chunk,
    "left": lambda case: lambda b, h, q, k, left, right, document: left[b, k],
    "right": lambda case: lambda b, h, q, k, left, right, document: right[b, k],
    "packed": lambda case: lambda b, h, q, k, left, right, document: document[b, q + case.offset] == document[b, k],
}


def draw_case(seed: int, query_length: int, offset: int, window: int, chunk: int) -> Case:
    """Draw pads and documents."""
    generator = torch.Generator().manual_seed(seed)
    key_length = query_length + offset

    def cut() -> Tensor:
        return torch.randint(0, key_length + 1, (BATCH, 1), generator=generator)

    position = torch.arange(key_length)
    ends = torch.rand(BATCH, key_length, generator=generator) < torch.rand((), generator=generator) / 4
    names = torch.randperm(key_length + 1, generator=generator)
    return Case(
        AttentionSizes(BATCH, HEADS, query_length, key_length),
        offset,
        window,
        chunk,
        left=position >= cut(),
        right=position < cut(),
        document=names[ends.cumsum(-1)],
    )


cases = st.builds(
    draw_case, st.integers(0, 2**32), *[st.integers(1, 90), st.integers(0, 70)], *[st.integers(1, 60)] * 2
)
block_sizes = st.sampled_from([2, 8, 16])


def conjunction(case: Case, names: list[str]) -> Mask:
    terms = [TERMS[name](case) for name in names]

    def mask(*arguments: Any) -> Tensor:
        result = terms[0](*arguments)
        for term in terms[1:]:
            result = result & term(*arguments)
        return result

    return mask


@settings(deadline=None, max_examples=150)
@example(case=draw_case(3, 1, 1, 1, 1), block_size=2, names=["left", "window", "right"], count=3)
@given(case=cases, block_size=block_sizes, names=st.permutations(list(TERMS)), count=st.integers(1, 4))
def test_conjunctions_are_exact(case: Case, block_size: int, names: list[str], count: int) -> None:
    mask = conjunction(case, names[:count])
    bounds = classify(mask, case.captures(), case.sizes, block_size)
    assert_exact(bounds, classify_by_pairs(materialise(mask, case.captures(), case.sizes), block_size))


@settings(deadline=None, max_examples=60)
@given(case=cases, block_size=block_sizes, names=st.permutations(list(TERMS)))
def test_disjunctions_within_a_conjunction_are_sound(case: Case, block_size: int, names: list[str]) -> None:
    either, both = conjunction(case, names[:2]), conjunction(case, names[2:4])
    last = conjunction(case, names[4:5])

    def mask(*arguments: Any) -> Tensor:
        return (either(*arguments) | ~both(*arguments)) & last(*arguments)

    bounds = classify(mask, case.captures(), case.sizes, block_size)
    assert_sound(bounds, classify_by_pairs(materialise(mask, case.captures(), case.sizes), block_size))


@settings(deadline=None, max_examples=60)
@given(
    case=cases,
    names=st.sampled_from(
        [
            ["causal"],
            ["left"],
            ["packed"],
            ["causal", "window"],
            ["causal", "left"],
            ["causal", "right"],
            ["causal", "packed"],
            ["causal", "packed", "right"],
            ["causal", "window", "left", "packed"],
        ]
    ),
)
def test_full_and_partial_blocks_are_those_of_torch(case: Case, names: list[str]) -> None:
    # Torch pads ragged blocks with False; lengths here are whole blocks, cut from the drawn ones.
    length = 16 * math.ceil(case.sizes.query_length / 16)
    case = draw_case(length, length, 16 * (case.offset // 16), case.window, case.chunk)
    mask = conjunction(case, names)
    theirs = create_block_mask(
        lambda b, h, q, k: mask(b, h, q, k, *case.captures()), *case.sizes, device="cpu", BLOCK_SIZE=16
    )
    bounds = classify(mask, case.captures(), case.sizes, 16)

    def to_dense(counts: Tensor | None, indices: Tensor | None) -> Tensor:
        assert counts is not None
        assert indices is not None
        used = torch.arange(indices.shape[-1]) < counts[..., None]
        return torch.zeros(indices.shape, dtype=torch.bool).scatter_(-1, indices.long(), used)

    full = to_dense(theirs.full_kv_num_blocks, theirs.full_kv_indices)
    partial = to_dense(theirs.kv_num_blocks, theirs.kv_indices)
    assert_exact(bounds, BlockBounds(full, full | partial))


@pytest.mark.parametrize("block_size", [2, 16])
def test_an_offset_may_be_a_tensor(block_size: int) -> None:
    sizes, offset = AttentionSizes(1, 1, 45, 83), torch.tensor(38)

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor, offset: Tensor) -> Tensor:
        return (k <= q + offset) & (q + offset - k < 20)

    expected = classify_by_pairs(materialise(mask, (offset,), sizes), block_size)
    assert_exact(classify(mask, (offset,), sizes, block_size), expected)


def test_a_mask_of_pairs_is_exact_in_any_expression() -> None:
    sizes = AttentionSizes(2, 3, 40, 56)
    user_mask = torch.rand(2, 1, 40, 56) > 0.99

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor, user_mask: Tensor) -> Tensor:
        return (user_mask[b, 0 * h, q, k] & (q >= k)) | (k == 30)

    expected = classify_by_pairs(materialise(mask, (user_mask,), sizes), 8)
    assert_exact(classify(mask, (user_mask,), sizes, 8), expected)


def test_sizes_of_indices_that_a_mask_ignores_are_one() -> None:
    sizes, lengths = AttentionSizes(3, 5, 40, 56), torch.tensor([8, 30, 56])
    shape = torch.Size([5, 7])
    assert classify(lambda b, h, q, k: q >= k, (), sizes, 8).certain.shape == (1, 1, *shape)
    assert classify(lambda b, h, q, k, n: k < n[b], (lengths,), sizes, 8).certain.shape == (3, 1, *shape)
    assert classify(lambda b, h, q, k: q * h >= k, (), sizes, 8).possible.shape == (1, 5, *shape)
    every_block = classify(lambda b, h, q, k, n: n[b] > 20, (lengths,), sizes, 8)
    assert every_block.possible.shape == (3, 1, *shape)
    assert every_block.certain.all((-3, -2, -1)).tolist() == [False, True, True]
    assert classify(lambda b, h, q, k: torch.ones((), dtype=torch.bool), (), sizes, 8).certain.shape == (1, 1, *shape)


def test_a_traced_run_equals_an_eager_one_at_every_length() -> None:
    def mask(
        b: Tensor, h: Tensor, q: Tensor, k: Tensor, pad: Tensor, ids: Tensor, offset: int, start: Tensor
    ) -> Tensor:
        same = ids[b, q + offset] == ids[b, k]
        return (q + offset >= k) & (q + offset - k < 33) & pad[b, k] & same & (k >= start) & ((q - k) // 3 < offset)

    captures = (torch.ones(2, 90, dtype=torch.bool), torch.zeros(2, 90, dtype=torch.int64), 20, torch.tensor(4))
    mask_mod = trace_mask(mask, *captures, tracing_mode="symbolic")

    def run(query: Tensor, pad: Tensor, ids: Tensor, start: Tensor) -> BlockBounds:
        (batch, length), key_length = query.shape, pad.shape[1]
        if length < 32 or key_length - length < 2:  # what the pass knows of lengths
            raise AssertionError
        sizes = AttentionSizes(batch, 4, length, key_length)
        return classify_blocks(mask_mod, (pad, ids, key_length - length, start), sizes, 16, query.device)

    def inputs(batch: int, length: int, key_length: int) -> tuple[Tensor, ...]:
        ids = (torch.rand(batch, key_length) < 0.1).cumsum(-1)
        return torch.empty(batch, length), torch.rand(batch, key_length) < 0.9, ids, torch.tensor(7)

    traced = make_fx(run, tracing_mode="symbolic")(*inputs(2, 70, 90))
    guards = [guard.expr for guard in traced.shape_env.guards]
    symbols = {str(symbol): symbol for guard in guards for symbol in guard.free_symbols}
    names = [str(size) for x in traced.graph.find_nodes(op="placeholder")[:2] for size in x.meta["val"].shape]
    for batch, length, key_length in [(2, 70, 90), (3, 32, 90), (5, 129, 500), (7, 2000, 2048)]:
        arguments = inputs(batch, length, key_length)
        for ours, expected in zip(traced(*arguments), run(*arguments), strict=True):
            assert torch.equal(ours, expected)
        values = dict(zip(names, (batch, length, batch, key_length), strict=True))
        for guard in guards:
            assert guard.subs({symbols[name]: values[name] for name in symbols}), guard
