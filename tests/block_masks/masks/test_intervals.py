"""Blocks classified from intervals, against every pair of tokens and against torch's create_block_mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers.mask_graphs import Mask, classify_by_pairs, materialise, trace_mask
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import create_block_mask

from flexprefill_compile.block_masks.layout import AttentionSizes
from flexprefill_compile.block_masks.masks.intervals import BlockBounds, classify_blocks

CPU = torch.device("cpu")
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


def classify(mask: Mask, captures: tuple[Any, ...], sizes: AttentionSizes, block_size: int) -> BlockBounds:
    return classify_blocks(trace_mask(mask, *captures), captures, sizes, block_size, CPU)


def assert_sound(bounds: BlockBounds, expected: BlockBounds) -> None:
    assert (bounds.certain <= expected.certain).all(), "a block called full isn't"
    assert (bounds.possible >= expected.possible).all(), "a block called empty isn't"


def assert_exact(bounds: BlockBounds, expected: BlockBounds) -> None:
    assert torch.equal(bounds.certain.expand_as(expected.certain), expected.certain)
    assert torch.equal(bounds.possible.expand_as(expected.possible), expected.possible)


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


LEAVES: list[Term] = [
    lambda q, k, bias, rows, number: q,
    lambda q, k, bias, rows, number: k,
    lambda q, k, bias, rows, number: q - k,
    lambda q, k, bias, rows, number: bias[q],
    lambda q, k, bias, rows, number: bias[k],
    lambda q, k, bias, rows, number: rows[k],
    lambda q, k, bias, rows, number: number,
]
NUMBERS: list[Term] = [
    torch.add,
    torch.sub,
    torch.mul,
    torch.minimum,
    torch.maximum,
    lambda x, y: torch.where(x > y, x, y + 1),
    lambda x, y: (x - y).abs(),
    lambda x, y: -x - 2 * y,
    lambda x, y: torch.sub(x, y, alpha=-3),
    lambda x, y: (x - y).clamp(-5, 7),
    lambda x, y: (x - y) * 0.5,
    lambda x, y: (x - y).sigmoid(),
    lambda x, y: (x - y).div(3, rounding_mode="trunc"),
    lambda x, y: (x - y) // 4 + (x + y) % 5,
    lambda x, y: (x - y).to(torch.int8),
    lambda x, y: (x < y).float() - (x == y).long(),
]
COMPARISONS: list[Term] = [torch.lt, torch.le, torch.gt, torch.ge, torch.eq, torch.ne]
LOGIC: list[Term] = [
    torch.logical_and,
    torch.logical_or,
    torch.logical_xor,
    lambda x, y: x & ~y,
    lambda x, y: x | y.logical_not(),
    lambda x, y: torch.where(x, y, ~x),
    lambda x, y: x == y,
]
numbers = st.recursive(
    st.sampled_from(LEAVES), lambda children: st.tuples(st.sampled_from(NUMBERS), children, children), max_leaves=4
)
comparisons = st.tuples(st.sampled_from(COMPARISONS), numbers, numbers)
expressions = st.recursive(
    comparisons, lambda children: st.tuples(st.sampled_from(LOGIC), children, children), max_leaves=4
)
SPECIAL = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -1.0, 3.5, 20.0])
EXTREME = torch.tensor([2**63 - 1, -(2**63), -1, 0, 1, 7, 40])


def evaluate(expression: Any, *leaves: Any) -> Tensor:
    if callable(expression):
        return expression(*leaves)
    op, left, right = expression
    return op(evaluate(left, *leaves), evaluate(right, *leaves))


@settings(deadline=None, max_examples=150)
@given(
    expression=expressions,
    seed=st.integers(0, 2**32),
    block_size=st.sampled_from([2, 5]),
    share=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_any_expression_is_sound_with_nan_inf_and_overflow(
    expression: Any, seed: int, block_size: int, share: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = AttentionSizes(1, 1, 12, 13)

    def draw(common: Tensor, special: Tensor) -> Tensor:
        drawn = special[torch.randint(len(special), (13,), generator=generator)]
        return torch.where(torch.rand(13, generator=generator) < share, drawn, common)

    bias = draw(torch.randn(13, generator=generator).round(decimals=1) * 9, SPECIAL)
    rows = draw(torch.randint(-9, 20, (13,), generator=generator), EXTREME)
    captures = (bias, rows, torch.tensor(3))

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor, bias: Tensor, rows: Tensor, number: Tensor) -> Tensor:
        return evaluate(expression, q, k, bias, rows, number)

    bounds = classify(mask, captures, sizes, block_size)
    assert_sound(bounds, classify_by_pairs(materialise(mask, captures, sizes), block_size))


@pytest.mark.parametrize(
    "term",
    [
        lambda q, k, x, n: (x[q] - x[k]).log() <= torch.inf,  # an op without a rule
        lambda q, k, x, n: x[q] - x[k] >= -torch.inf,  # inf - inf
        lambda q, k, x, n: (x[q] * (q - k)).abs() <= torch.inf,  # inf * 0, with zero between the ends
        lambda q, k, x, n: (x[q] - x[k]).minimum(q * 1.0) <= 10,
        lambda q, k, x, n: n[k] - q > 2**63 - 5,  # only what wraps around can be
        lambda q, k, x, n: -(n[k] - k) + 0 * q < 0,
        lambda q, k, x, n: n[k] * (q - k) != -(2**63),
        lambda q, k, x, n: (n[k] + q).to(torch.int32) == 3,
    ],
)
def test_what_lies_between_the_ends_is_not_forgotten(term: Term) -> None:
    captures = (torch.tensor([1.0, torch.inf, -3.0, -torch.inf] * 4), torch.full((16,), -(2**63)))
    sizes = AttentionSizes(1, 1, 16, 16)

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor, x: Tensor, n: Tensor) -> Tensor:
        return term(q, k, x, n)

    bounds = classify(mask, captures, sizes, 8)
    assert_sound(bounds, classify_by_pairs(materialise(mask, captures, sizes), 8))


@pytest.mark.parametrize("compare", COMPARISONS)
def test_nan_makes_a_block_partial(compare: Term) -> None:
    bias = torch.full((16,), torch.nan)

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
        return compare(q * 1.0, bias[k])

    bounds = classify(mask, (bias,), AttentionSizes(1, 1, 16, 16), 8)
    # Equality sees single values, and knows that NaN equals none.
    is_equality = compare in (torch.eq, torch.ne)
    assert bounds.possible.all() == (compare is not torch.eq)
    assert bounds.certain.any() == (is_equality and compare is torch.ne)


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
