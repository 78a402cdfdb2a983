"""Insert the collectives of sequence parallelism: n ranks, each with a stretch of the prompt.

    q: (B, H, S/n, D), all heads of a stretch   ->  exchange_tokens  ->   (B, H/n, S, D), some heads of the prompt
    out: (B, H/n, S, D)                         ->  exchange_heads   ->   (B, H, S/n, D)
    padding: (B, S/n)                           ->  gather           ->   (B, S)

Both exchanges are an all-to-all (DeepSpeed Ulysses, arXiv 2309.14509). Tokens come first in what is sent, so that what
arrives needs no copy: it is read by its strides, in the layout that models have before they split heads.
"""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from flexprefill_compile.settings.rank_groups import RankGroup

from ..graph.nodes import example_of
from ..rewrite.insertion import Insert

_all_to_all = torch.ops._c10d_functional.all_to_all_single.default
_all_gather = torch.ops._c10d_functional.all_gather_into_tensor.default
_wait = torch.ops._c10d_functional.wait_tensor.default


def exchange_tokens(insert: Insert, x: Node, group: RankGroup) -> Node:
    """Insert what turns (B, H, S/n, D), all heads of a stretch, into (B, H/n, S, D), this rank's heads of the prompt.

    Args:
        insert: Adds a call to the graph.
        x: Its heads are a multiple of the ranks.
        group: The ranks, in the order of their stretches.
    """
    parted = insert(torch.unflatten, x, 1, (group.size, -1))
    tokens_first = insert(torch.permute, parted, (1, 3, 0, 2, 4))
    received = _exchange(insert, tokens_first, group)
    return insert(torch.permute, insert(torch.flatten, received, 0, 1), (1, 2, 0, 3))


def exchange_heads(insert: Insert, x: Node, group: RankGroup, *, tokens_first: bool) -> Node:
    """Insert what turns (B, H/n, S, D), some heads of the prompt, into (B, H, S/n, D), all heads of a stretch.

    Args:
        insert: Adds a call to the graph.
        x: The attention's output.
        group: The ranks, in the order of their stretches.
        tokens_first: Whether the result lies in memory as (B, S/n, H, D); else as (B, H, S/n, D).
    """
    parted = insert(torch.unflatten, insert(torch.permute, x, (2, 0, 1, 3)), 0, (group.size, -1))
    received = _exchange(insert, parted, group)
    if tokens_first:
        joined = insert(torch.flatten, insert(torch.permute, received, (2, 1, 0, 3, 4)), 2, 3)
        return insert(torch.transpose, joined, 1, 2)
    return insert(torch.flatten, insert(torch.permute, received, (2, 0, 3, 1, 4)), 1, 2)


def gather(insert: Insert, x: Node, dim: int, group: RankGroup) -> Node:
    """Insert what joins the stretches of all ranks along a dimension."""
    dtype = example_of(x).dtype
    if dtype == torch.bool:  # which not every backend sends
        x = insert(torch.ops.aten.to.dtype, x, torch.uint8)
    moved = insert(torch.Tensor.contiguous, insert(torch.movedim, x, dim, 0))
    gathered = insert(_wait, insert(_all_gather, moved, group.size, group.name))
    joined = insert(torch.movedim, gathered, 0, dim)
    return insert(torch.ops.aten.to.dtype, joined, dtype) if dtype == torch.bool else joined


def own_heads(insert: Insert, x: Node, group: RankGroup, dim: int = 1) -> Node:
    """Insert what takes this rank's heads of a tensor with all heads, a multiple of the ranks."""
    count = int(example_of(x).shape[dim]) // group.size
    return insert(torch.narrow, x, dim, group.rank * count, count)


def repeat_key_heads(insert: Insert, x: Node, group: RankGroup) -> Node:
    """Insert the repetition of key heads with which each rank gets those that its query heads need, as few as can be.

    Query heads stay in equal groups: where n divides the query heads, n / gcd(Hkv, n) divides the queries of a key.
    """
    repeats = group.size // math.gcd(int(example_of(x).shape[1]), group.size)
    return x if repeats == 1 else insert(torch.repeat_interleave, x, repeats, 1)


def _exchange(insert: Insert, x: Node, group: RankGroup) -> Node:
    """Insert an all-to-all: part i of the first dimension goes to rank i, and what comes from rank i is part i."""
    splits = [1] * group.size
    sent = insert(_all_to_all, insert(torch.Tensor.contiguous, x), splits, splits, group.name)
    return insert(_wait, sent)
