"""A slow float64 oracle of the method, one head and one block at a time, to be read beside the paper. Tests only.

It shares no code with the fast path. Conventions where the paper leaves a choice: the representative queries are the
last ``block_size`` rows, wherever the blocks begin; budgets count blocks beside the first key block and the diagonal;
equal masses are taken from the left.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from flexprefill_compile.settings.config import SparsePrefillConfig


@dataclasses.dataclass(frozen=True)
class HeadSelection:
    """What one head computes.

    Attributes:
        pattern: "query-aware" or "vertical-slash".
        distance: Between the pooled estimate and the true attention of the representative queries.
        columns: (num_blocks,) float64, their attention by key block.
        diagonals: (num_blocks,) float64, their attention by block diagonal.
        blocks: (num_blocks, num_blocks) bool, the blocks to compute.
    """

    pattern: str
    distance: float
    columns: Tensor
    diagonals: Tensor
    blocks: Tensor


def select_head(query: Tensor, key: Tensor, scale: float, config: SparsePrefillConfig) -> HeadSelection:
    """Run Algorithms 1 to 4 on one head.

    Args:
        query: (S, D).
        key: (S, D).
        scale: Factor on the scores.
        config: What to select.
    """
    query, key = query.double(), key.double()
    length, block = len(query), config.block_size
    num_blocks = math.ceil(length / block)
    first_row = max(0, length - block)

    columns = torch.zeros(num_blocks, dtype=torch.float64)
    diagonals = torch.zeros(num_blocks, dtype=torch.float64)
    for row in range(first_row, length):
        weights = torch.softmax(key[: row + 1] @ query[row] * scale, 0) / (length - first_row)
        for column, weight in enumerate(weights.tolist()):
            columns[column // block] += weight
            diagonal, remainder = divmod(row - column, block)
            diagonals[diagonal] += weight * (block - remainder) / block
            diagonals[min(diagonal + 1, num_blocks - 1)] += weight * remainder / block

    pooled_query = torch.stack([rows.mean(0) for rows in query.split(block)])
    pooled_key = torch.stack([rows.mean(0) for rows in key.split(block)])
    estimate = torch.softmax(pooled_key @ query[first_row:].mean(0) * scale, 0)
    distance = _js_distance(estimate.tolist(), columns.tolist())

    if distance < config.tau:
        scores = torch.zeros(num_blocks, num_blocks, dtype=torch.float64)
        for row in range(num_blocks):
            scores[row, : row + 1] = torch.softmax(pooled_key[: row + 1] @ pooled_query[row] * scale, 0)
        chosen = _fewest_reaching(scores.flatten().tolist(), config.gammas[0])
        selected = {divmod(index, num_blocks) for index in chosen}
    else:
        kept_columns = _fewest_reaching(columns.tolist(), config.gammas[0])
        kept_diagonals = _fewest_reaching(diagonals.tolist(), config.gammas[0])
        scores = torch.zeros(num_blocks, num_blocks, dtype=torch.float64)
        selected = set()
        for row in range(num_blocks):
            for column in range(row + 1):
                scores[row, column] = max(columns[column], diagonals[row - column])
                if column in kept_columns or row - column in kept_diagonals:
                    selected.add((row, column))

    if min(config.gammas) == 1:
        selected = {(row, column) for row in range(num_blocks) for column in range(row + 1)}

    blocks = torch.zeros(num_blocks, num_blocks, dtype=torch.bool)
    min_blocks = math.ceil(config.floor_at(length) / block)
    for row in range(num_blocks):
        optional = sorted(range(1, row), key=lambda column: -scores[row, column].item())
        kept = {column for column in optional if (row, column) in selected} | set(optional[:min_blocks])
        if config.max_budget is not None:
            kept = set([column for column in optional if column in kept][: config.max_budget // block])
        blocks[row, sorted(kept | {0, row})] = True
    return HeadSelection(
        "query-aware" if distance < config.tau else "vertical-slash", distance, columns, diagonals, blocks
    )


def _fewest_reaching(mass: list[float], gamma: float) -> set[int]:
    """Return the fewest entries whose sum reaches ``gamma`` of the total, the largest first."""
    total = math.fsum(mass)
    chosen: set[int] = set()
    reached = 0.0
    for index in sorted(range(len(mass)), key=lambda index: -mass[index]):
        if reached >= gamma * total:
            break
        chosen.add(index)
        reached += mass[index]
    return chosen


def _js_distance(p: list[float], q: list[float]) -> float:
    """Return the square root of the Jensen-Shannon divergence in nats."""

    def divergence_from_mean(x: list[float], y: list[float]) -> float:
        return math.fsum(a * math.log(2 * a / (a + b)) for a, b in zip(x, y, strict=True) if a > 0)

    return math.sqrt(max(0.0, (divergence_from_mean(p, q) + divergence_from_mean(q, p)) / 2))
