"""The checked reference computes what FlexAttention does, and refuses tables that disagree with their mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.checked_attention import TableError, attend_checked
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask

LENGTH, BLOCK = 150, 32
Damage = Callable[[list[Tensor]], None]


def windowed_mask(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
    return (query_index >= key_index) & (query_index - key_index < 70)


def cap_scores(score: Tensor, batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
    return 3 * torch.tanh(score / 3) - (query_index - key_index) * 0.1 * (head + 1)


def attend(damage: Damage | None = None) -> tuple[Tensor, Tensor]:
    """Return what the reference gives over (damaged) tables of a windowed mask, and what SDPA gives under it."""
    query = torch.randn(2, 4, LENGTH, 16)
    key, value = torch.randn(2, 2, 2, LENGTH, 16)
    lengths = {"Q_LEN": LENGTH, "KV_LEN": LENGTH, "device": "cpu", "BLOCK_SIZE": BLOCK}
    block_mask: Any = create_block_mask(windowed_mask, 2, 4, **lengths)
    entries = list(block_mask.as_tuple())
    entries[2:6] = tables = [table.clone() for table in entries[2:6]]
    if damage is not None:
        damage(tables)
    actual, *_ = attend_checked(query, key, value, cap_scores, tuple(entries), 0.25, {})

    indices = torch.arange(2).view(-1, 1, 1, 1), torch.arange(4).view(-1, 1, 1)
    rows, columns = torch.arange(LENGTH).view(-1, 1), torch.arange(LENGTH)
    key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
    scores = cap_scores(query @ key.mT * 0.25, *indices, rows, columns)
    weights = F.softmax(scores.masked_fill(~windowed_mask(*indices, rows, columns), -torch.inf), dim=-1)
    return actual, weights @ value


def test_it_attends_under_the_mask_and_the_score_mod() -> None:
    actual, expected = attend()
    torch.testing.assert_close(actual, expected)


def drop_a_partial_block(tables: list[Tensor]) -> None:
    tables[0][1, 2, 3] -= 1


def drop_a_full_block(tables: list[Tensor]) -> None:
    row = (tables[2][0, 0] > 0).nonzero()[-1]
    tables[2][0, 0, row] -= 1


def call_a_partial_block_full(tables: list[Tensor]) -> None:
    tables[2][1, 3, 0], tables[0][1, 3, 0] = 1, 0
    tables[3][1, 3, 0, 0] = 0


def list_a_block_twice(tables: list[Tensor]) -> None:
    tables[0][0, 1, 4] += 1
    tables[1][0, 1, 4] = tables[1][0, 1, 4, 0]


def list_a_block_in_both_tables(tables: list[Tensor]) -> None:
    row = int((tables[2][0, 0] > 0).nonzero()[-1])
    tables[1][0, 0, row, 0] = tables[3][0, 0, row, 0]


def list_a_block_out_of_range(tables: list[Tensor]) -> None:
    tables[1][0, 0, 2, 0] = 5


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_a_partial_block, "in no block, the first at batch 1, head 2"),
        (drop_a_full_block, "in no block"),
        (call_a_partial_block_full, "that the mask forbids, the first at batch 1, head 3, query 0, key 1"),
        (list_a_block_twice, "twice"),
        (list_a_block_in_both_tables, "both as partial and as full"),
        (list_a_block_out_of_range, "out of range"),
    ],
)
def test_damaged_tables_are_refused(damage: Damage, message: str) -> None:
    with pytest.raises(TableError, match=message):
        attend(damage)
