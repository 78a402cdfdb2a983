"""Nested compile regions: how they are marked, and how dynamo calls them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph

__all__ = ["invoke_subgraph", "mark_region"]


def mark_region(function: Callable[..., Any], most_kinds: int) -> Callable[..., Any]:
    """Mark a function as a region that is traced once for calls that are alike, and may be called in so many kinds."""
    mark: Any = torch.compiler.nested_compile_region
    # From torch 2.13 on there is a limit, past which it raises.
    has_limit = "max_reuse_entries" in inspect.signature(mark).parameters
    marked: Callable[..., Any] = mark(function, **({"max_reuse_entries": most_kinds} if has_limit else {}))
    return marked
