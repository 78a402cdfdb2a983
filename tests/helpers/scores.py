"""Block scores by their definitions, slowly, in float64: what the scoring estimators are tested against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Of one head: query (S, D), key (S, D), scale, block size, first and last + 1 token that count.
Score = Callable[[Tensor, Tensor, float, int, int, int], Tensor]


def list_groups(block: int, size: int, block_size: int, start: int, stop: int) -> list[list[int]]:
    """Return the tokens that count of each group of a block, groups without any left out."""
    firsts = range(block * block_size, (block + 1) * block_size, size)
    groups = [[token for token in range(first, first + size) if start <= token < stop] for first in firsts]
    return [group for group in groups if group]


def score_rows(
    query: Tensor, key: Tensor, scale: float, block_size: int, start: int, stop: int, *, rows_per_block: int
) -> Tensor:
    """Return the attention of the middle token of each group, averaged by the tokens that it stands for."""
    num_blocks = -(-query.shape[0] // block_size)
    shares = torch.zeros(num_blocks, num_blocks, dtype=torch.float64)
    for block in range(num_blocks):
        groups = list_groups(block, block_size // rows_per_block, block_size, start, stop)
        for group in groups:
            row = group[len(group) // 2]
            weights = torch.softmax(key[start : row + 1].double() @ query[row].double() * scale, 0)
            for token, weight in enumerate(weights.tolist(), start):
                shares[block, token // block_size] += weight * len(group) / sum(map(len, groups))
    return shares


def score_groups(
    query: Tensor,
    key: Tensor,
    scale: float,
    block_size: int,
    start: int,
    stop: int,
    *,
    size: int,
) -> Tensor:
    """Return the attention of groups of queries to groups of keys, by the mean along their antidiagonal."""
    num_blocks = -(-query.shape[0] // block_size)
    key_groups = [(b, group) for b in range(num_blocks) for group in list_groups(b, size, block_size, start, stop)]
    shares = torch.zeros(num_blocks, num_blocks, dtype=torch.float64)
    for block in range(num_blocks):
        groups = list_groups(block, size, block_size, start, stop)
        for group in groups:
            seen = [(b, keys) for b, keys in key_groups if keys[0] <= group[-1]]
            logits = []
            for _, keys in seen:
                score = compare_antidiagonal(fill(query, group, size), fill(key, keys, size)) * scale
                logits.append(score + torch.tensor(len(keys) / size, dtype=torch.float64).log())
            weights = torch.softmax(torch.stack(logits), 0).tolist()
            for (key_block, _), weight in zip(seen, weights, strict=True):
                shares[block, key_block] += weight * len(group) / sum(map(len, groups))
    return shares


def fill(x: Tensor, group: list[int], size: int) -> Tensor:
    """Return the tokens at their places in the group, (size, D), the missing ones as the mean of the others."""
    tokens = x[group].double()
    filled = tokens.mean(0).repeat(size, 1)
    for place, token in enumerate(group):
        filled[token % size] = tokens[place]
    return filled


def compare_antidiagonal(queries: Tensor, keys: Tensor) -> Tensor:
    return torch.stack([queries[len(keys) - 1 - i] @ keys[i] for i in range(len(keys))]).sum() / len(keys)


def score_sampled(query: Tensor, key: Tensor, scale: float, block_size: int, start: int, stop: int) -> Tensor:
    return score_rows(query, key, scale, block_size, start, stop, rows_per_block=4)


def score_xattention(query: Tensor, key: Tensor, scale: float, block_size: int, start: int, stop: int) -> Tensor:
    return score_groups(query, key, scale, block_size, start, stop, size=8)


def score_auto(query: Tensor, key: Tensor, scale: float, block_size: int, start: int, stop: int) -> Tensor:
    rows = score_rows(query, key, scale, block_size, start, stop, rows_per_block=block_size // 8)
    return (rows + score_groups(query, key, scale, block_size, start, stop, size=16)) / 2


SCORES: dict[str, Score] = {"sampled": score_sampled, "xattention": score_xattention, "auto": score_auto}
