"""A FlexAttention call's own block tables: kept to the letter, however they were made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from flexprefill_compile.backend import FlexPrefillBackend

LENGTH, BLOCK = 144, 32
NUM_BLOCKS = 5  # the last one ragged
Tables = tuple[BlockMask, Tensor]  # and which pairs it computes, (1 or B, 1 or H, S, S) bool
POSITION = torch.arange(LENGTH)
CAUSAL = POSITION[:, None] >= POSITION


def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def first_and_diagonal() -> tuple[Tensor, Tensor]:
    """Return counts and columns of the first block and the diagonal."""
    columns = torch.zeros(1, 1, NUM_BLOCKS, NUM_BLOCKS, dtype=torch.int32)
    columns[..., 1] = torch.arange(NUM_BLOCKS)
    return torch.tensor([[[1, 2, 2, 2, 2]]], dtype=torch.int32), columns


def tokens(blocks: Tensor) -> Tensor:
    """Return which pairs (S, S) some blocks (num_blocks, num_blocks) hold."""
    return blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:LENGTH, :LENGTH]


GRID = torch.arange(NUM_BLOCKS)
KEPT = tokens((GRID[:, None] == GRID) | (GRID == 0))


def by_hand() -> Tables:
    made = BlockMask.from_kv_blocks(
        *first_and_diagonal(), BLOCK_SIZE=BLOCK, mask_mod=causal, seq_lengths=(LENGTH, LENGTH)
    )
    return made, KEPT & CAUSAL


def without_query_tables() -> Tables:
    made = BlockMask.from_kv_blocks(
        *first_and_diagonal(),
        BLOCK_SIZE=BLOCK,
        mask_mod=causal,
        seq_lengths=(LENGTH, LENGTH),
        compute_q_blocks=False,
    )
    return made, KEPT & CAUSAL


def narrow() -> Tables:
    counts, columns = first_and_diagonal()
    made = BlockMask.from_kv_blocks(
        counts,
        columns[..., :2].contiguous(),
        BLOCK_SIZE=BLOCK,
        mask_mod=causal,
        seq_lengths=(LENGTH, LENGTH),
        compute_q_blocks=False,
    )
    return made, KEPT & CAUSAL


def with_full_blocks_that_the_mask_cuts() -> Tables:
    """Full blocks run without the mask_mod: the diagonal here, the ragged last block of it too."""
    zeros = torch.zeros(1, 1, NUM_BLOCKS, NUM_BLOCKS, dtype=torch.int32)
    counts = torch.tensor([[[0, 1, 1, 1, 1]]], dtype=torch.int32)
    full = zeros.clone()
    full[..., 0] = torch.arange(NUM_BLOCKS)
    made = BlockMask.from_kv_blocks(
        counts,
        zeros,
        torch.ones(1, 1, NUM_BLOCKS, dtype=torch.int32),
        full,
        BLOCK_SIZE=BLOCK,
        mask_mod=causal,
        seq_lengths=(LENGTH, LENGTH),
    )
    return made, KEPT


def sliced() -> Tables:
    """One head's tables of several, with a mask_mod of its own, which slicing takes away."""
    of_heads = create_block_mask(
        lambda b, h, q, k: (q >= k) & (q - k < 32 * (h + 1)), 1, 3, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=BLOCK
    )
    made = of_heads[:, 1:2]
    made.mask_mod = causal
    visible = of_heads.to_dense()[0, 1].bool()
    return made, tokens(visible) & CAUSAL


MAKERS = (by_hand, without_query_tables, narrow, with_full_blocks_that_the_mask_cuts, sliced)


@pytest.mark.parametrize("make", MAKERS)
def test_the_call_computes_its_own_blocks(make: Any) -> None:
    tables, kept = make()
    query, key, value = torch.randn(3, 1, 2, LENGTH, 32)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flex_attention(query, key, value, block_mask=tables)  # type: ignore[return-value]

    backend = FlexPrefillBackend()
    with torch.no_grad():
        options = {"gamma": 1.0, "block_size": BLOCK, "min_length": 64}
        actual = torch.compile(attend, backend=backend, options=options)(query, key, value)
    assert backend.report.num_rewritten == 1, str(backend.report)
    torch.testing.assert_close(actual, F.scaled_dot_product_attention(query, key, value, attn_mask=kept))
