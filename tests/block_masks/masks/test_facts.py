"""What is known of a mask, against the whole mask read token by token; and that it can be traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import masks
from helpers.inputs import RecordSizes
from hypothesis import given, settings
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from flexprefill_compile.block_masks.layout import AttentionSizes, count_blocks
from flexprefill_compile.block_masks.masks.facts import MaskFacts, describe_mask
from flexprefill_compile.block_masks.masks.intervals import BlockBounds

BLOCK = 16


@settings(deadline=None, max_examples=60)
@given(call=masks.calls())
def test_facts_are_those_of_each_token(call: masks.Call) -> None:
    mask_mod, sizes, offset, is_packed = call
    facts = masks.find_facts(mask_mod, sizes, BLOCK, offset=offset, is_packed=is_packed)
    num_q_blocks, num_k_blocks = facts.possible.shape[-2:]
    mask = masks.materialise(mask_mod, sizes)
    for row, sequences in enumerate(masks.list_sequences(mask, offset, is_packed)):
        counted = masks.count_tokens(sequences, BLOCK)
        keys = {key: number for number, tokens in enumerate(counted) for key in tokens}
        assert facts.key_counts[row].flatten().nonzero().flatten().tolist() == sorted(keys)
        queries = [key - offset for key in sorted(keys) if 0 <= key - offset < sizes.query_length]
        assert facts.query_counts[row].flatten().nonzero().flatten().tolist() == queries
        for number, (tokens, sequence) in enumerate(zip(counted, sequences, strict=True)):
            expected = masks.list_representatives(sequence, sizes.query_length, offset, BLOCK)
            for block in {key // BLOCK for key in tokens}:
                listed = facts.rows[row, block if is_packed else 0].tolist()
                assert [query for query in reversed(listed) if query >= 0] == expected
                assert facts.first_block[row, block if is_packed else 0] == tokens[0] // BLOCK
                for index, query in enumerate(listed):
                    sees = [
                        query >= 0 and bool(mask[row, 0, query, key]) and keys.get(key) == number
                        for key in range(block * BLOCK, min((block + 1) * BLOCK, sizes.key_length))
                    ]
                    assert facts.row_mask[row, 0, block, index, : len(sees)].tolist() == sees
                    assert not facts.row_mask[row, 0, block, index, len(sees) :].any()

        owned = {key: number for number, tokens in enumerate(sequences) for key in tokens}
        shared = {key // BLOCK for key in owned if key not in keys}
        for i in range(num_q_blocks):
            positions = range(i * BLOCK + offset, (i + 1) * BLOCK + offset)
            here = [key for key in positions if key in keys and key - offset < sizes.query_length]
            number = keys[here[-1]] if here else None
            for j in range(num_k_blocks):
                is_required = (
                    not keys
                    or j in {position // BLOCK for position in positions}
                    or j in shared
                    or (offset == 0 and i in shared)
                    or (number is not None and j == counted[number][0] // BLOCK)
                )
                expected = is_required and bool(facts.possible[row, 0, i, j])
                if here or not keys:
                    assert facts.required[row, 0, i, j] == expected
                assert facts.possible[row, 0, i, j] or not facts.required[row, 0, i, j]


@pytest.mark.parametrize("offset", [0, 16, 21])
def test_offset_may_be_a_tensor(offset: int) -> None:
    sizes = AttentionSizes(1, 1, 70, 100)
    as_int = masks.find_facts(masks.chunk(offset), sizes, BLOCK, offset=offset)
    as_tensor = masks.find_facts(masks.chunk(offset), sizes, BLOCK, offset=torch.tensor(offset, dtype=torch.int32))
    for left, right in zip(as_int, as_tensor, strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


def padded_mask(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor, *captures: Any) -> Tensor:
    is_token, ids = captures
    mask: Tensor = torch.ops.aten.index.Tensor(is_token, [batch, key_index])
    same = torch.ops.aten.index.Tensor(ids, [query_index]) == torch.ops.aten.index.Tensor(ids, [key_index])
    return mask & same & (query_index >= key_index)


@pytest.mark.parametrize("is_packed", [False, True])
def test_description_is_traced_once_for_all_sizes(is_packed: bool) -> None:
    """With symbolic sizes, and without a guard on them: the trace of one length serves the others."""

    def describe(is_token: Tensor, ids: Tensor, certain: Tensor, possible: Tensor) -> MaskFacts:
        sizes = AttentionSizes(is_token.shape[0], 1, is_token.shape[1], is_token.shape[1])
        bounds = BlockBounds(certain, possible)
        return describe_mask(padded_mask, (is_token, ids), sizes, bounds, 0, is_packed, BLOCK)

    def inputs(length: int) -> list[Tensor]:
        is_token = torch.arange(length) < torch.tensor([[length], [length - 25]])
        ids = torch.arange(length) // 40
        mask = padded_mask(
            torch.arange(2).view(-1, 1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64),
            torch.arange(length).view(-1, 1), torch.arange(length), is_token, ids,
        )  # fmt: skip
        return [is_token, ids, *masks.classify(mask, BLOCK)]

    traced = make_fx(describe, tracing_mode="symbolic")(*inputs(150))
    for length in (150, 90, 333):
        for eager, from_trace in zip(describe(*inputs(length)), traced(*inputs(length)), strict=True):
            assert torch.equal(eager, from_trace)


def test_chunk_is_traced_with_a_symbolic_offset() -> None:
    def describe(query: Tensor, key: Tensor) -> MaskFacts:
        offset = key.shape[0] - query.shape[0]
        sizes = AttentionSizes(1, 1, query.shape[0], key.shape[0])
        grid = torch.ones(1, 1, count_blocks(query.shape[0], BLOCK), count_blocks(key.shape[0], BLOCK)).bool()
        return describe_mask(masks.chunk(offset), (), sizes, BlockBounds(grid, grid), offset, False, BLOCK)

    traced = make_fx(describe, tracing_mode="symbolic")(torch.empty(50), torch.empty(113))
    for query_length, key_length in [(50, 113), (64, 128), (100, 100), (20, 300)]:
        tensors = torch.empty(query_length), torch.empty(key_length)
        for eager, from_trace in zip(describe(*tensors), traced(*tensors), strict=True):
            assert torch.equal(eager, from_trace)


@pytest.mark.parametrize("is_packed", [False, True])
def test_largest_tensor_is_the_mask_of_the_representative_queries(is_packed: bool) -> None:
    length, block_size = 4096, 64
    blocks = torch.ones(64, 64, dtype=torch.bool).tril()[None, None]
    with RecordSizes() as recorded:
        sizes = AttentionSizes(1, 1, length, length)
        describe_mask(masks.causal, (), sizes, BlockBounds(blocks.tril(-1), blocks), 0, is_packed, block_size)
    assert recorded.largest <= block_size * length
