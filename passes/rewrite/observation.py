"""Show a rewritten attention to observers, at some of its rows.

    out = flex_attention(q, k, v, ...)[0]

becomes

    out = flexprefill.observe(flex_attention(q, k, v, ...)[0], q, k, v, tables, facts, ..., rows, ...)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from flexprefill_compile.block_masks.observed_attention import sample_rows

from ..graph.nodes import example_of
from ..graph.trace import inline
from ..lift.lifted_site import LiftedSite
from .insertion import Insert
from .mask_sharing import MaskSharing


def insert_observation(
    insert: Insert,
    lifted: LiftedSite,
    sharing: MaskSharing,
    tensors: Sequence[Node],
    tables: Sequence[Node],
    num_rows: int,
) -> Node:
    """Insert the op that shows the call to observers; return the node to use in place of the output."""
    _, query, key, _ = tensors
    parts = lifted.parts
    shared = None if lifted.is_plain else sharing.describe(lifted, query, key)
    score_bias = None if shared is None else sharing.bias_of_representatives(lifted, shared)
    rows, visible, row_bias = _insert_rows(sharing, lifted, query, key, num_rows)
    return insert(
        torch.ops.flexprefill.observe.default,
        *(*tensors, list(tables), list(shared.facts if shared else ()), score_bias, rows, visible, row_bias),
        *(parts.scale, parts.softcap, lifted.site.name),
    )


def _insert_rows(
    sharing: MaskSharing, lifted: LiftedSite, query: Node, key: Node, count: int
) -> tuple[Node, Node | None, Node | None]:
    """Insert the choice of some query rows, which keys they see, and what is added to their scores.

    Returns:
        The nodes of (R,), and of what broadcasts to (B, H, R, Skv): bool, None for causal, and None for no bias.
    """
    functions = () if lifted.is_plain else tuple(f for f in (lifted.parts.mask, lifted.parts.bias) if f is not None)
    captures = [sharing.captured.read(function, lifted.traced) for function in functions]
    device = example_of(query).device

    def sample(batch: int, heads: int, query_length: int, key_length: int, *values: Any) -> list[Tensor]:
        rows = sample_rows(count, query_length, device)
        positions = [torch.arange(batch, device=device), torch.arange(heads, device=device), rows]
        positions.append(torch.arange(key_length, device=device))
        indices = [x.view(-1, *[1] * (3 - dim)) for dim, x in enumerate(positions)]
        remaining = iter(values)
        return [
            rows,
            *(f.module(*indices, *(next(remaining) for _ in c)) for f, c in zip(functions, captures, strict=True)),
        ]

    sizes = sharing.captured.measure(query, key)
    rows, *found = inline(sharing.graph, sample, (*sizes, *(c for group in captures for c in group)))
    visible, row_bias, *_ = (*found, None, None)
    return rows, visible, row_bias
