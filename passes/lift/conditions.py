"""Conditions in a formula: their negations, of comparisons and captures alone, so that what has to hold stays apart.

~(future | padding)        ->  ~future & ~padding
~(cached & hidden)         ->  ~cached | ~hidden
~~padding                  ->  padding
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from .elements import dtype_of_element

aten = torch.ops.aten

NEGATIONS = (aten.logical_not, aten.bitwise_not)
_DUALS: dict[Any, Any] = {
    aten.logical_or: aten.bitwise_and.Tensor,
    aten.bitwise_or: aten.bitwise_and.Tensor,
    aten.logical_and: aten.bitwise_or.Tensor,
    aten.bitwise_and: aten.bitwise_or.Tensor,
}


def negated_by(condition: Node) -> Node | None:
    """Return the condition of which this one is the negation; None if it is none."""
    if getattr(condition.target, "overloadpacket", None) not in NEGATIONS:
        return None
    (negated,) = condition.all_input_nodes
    return negated if dtype_of_element(negated) == torch.bool else None  # of numbers, ~ is another thing


def negate(condition: Node, call: Callable[[Any, Sequence[Node]], Node]) -> Node:
    """Return the negation of a condition.

    Args:
        condition: A condition, or a number, which holds where it isn't 0.
        call: Adds an operation whose result is boolean to the graph.
    """
    negated = negated_by(condition)
    if negated is not None:
        return negated
    dual, parts = _DUALS.get(getattr(condition.target, "overloadpacket", None)), condition.all_input_nodes
    if dual is not None and len(parts) == 2 and all(dtype_of_element(part) == torch.bool for part in parts):
        return call(dual, [negate(part, call) for part in parts])
    return call(aten.logical_not.default, [condition])
