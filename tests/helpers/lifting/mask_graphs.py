"""Mask functions as graphs, and what a mask does to blocks by looking at every pair of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from flexprefill_compile.block_masks.layout import AttentionSizes
from flexprefill_compile.block_masks.masks.intervals import BlockBounds, classify_blocks

Mask = Callable[..., Tensor]


def trace_mask(mask: Mask, *captures: Any, tracing_mode: str = "real") -> GraphModule:
    """Trace a mask function to aten ops; ints among the captures become SymInts with ``tracing_mode="symbolic"``."""
    indices = [torch.zeros([2 if axis == i else 1 for axis in range(4)], dtype=torch.int64) for i in range(4)]
    graph_module: GraphModule = make_fx(mask, tracing_mode=tracing_mode)(*indices, *captures)
    graph_module.graph.eliminate_dead_code()
    return graph_module


def materialise(mask: Mask, captures: tuple[Any, ...], sizes: AttentionSizes) -> Tensor:
    """Return the mask of every pair of tokens, (B, H, query_length, key_length) bool."""
    indices = [torch.arange(size).view([-1 if axis == i else 1 for axis in range(4)]) for i, size in enumerate(sizes)]
    return mask(*indices, *captures).bool().expand(*sizes)


def classify_by_pairs(tokens: Tensor, block_size: int) -> BlockBounds:
    """Return all and any of the tokens that each block has, from (B, H, query_length, key_length) bool."""
    padding = (0, -tokens.shape[-1] % block_size, 0, -tokens.shape[-2] % block_size)

    def all_of_blocks(x: Tensor) -> Tensor:
        blocks = F.pad(x, padding, value=True).unflatten(-1, (-1, block_size)).unflatten(-3, (-1, block_size))
        return blocks.all(-1).all(-2)

    return BlockBounds(all_of_blocks(tokens), ~all_of_blocks(~tokens))


def classify(mask: Mask, captures: tuple[Any, ...], sizes: AttentionSizes, block_size: int) -> BlockBounds:
    return classify_blocks(trace_mask(mask, *captures), captures, sizes, block_size, torch.device("cpu"))


def assert_sound(bounds: BlockBounds, expected: BlockBounds) -> None:
    assert (bounds.certain <= expected.certain).all(), "a block called full isn't"
    assert (bounds.possible >= expected.possible).all(), "a block called empty isn't"


def assert_exact(bounds: BlockBounds, expected: BlockBounds) -> None:
    assert torch.equal(bounds.certain.expand_as(expected.certain), expected.certain)
    assert torch.equal(bounds.possible.expand_as(expected.possible), expected.possible)
