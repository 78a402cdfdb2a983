"""Conditions in a formula: their negations, of comparisons and captures alone, so that what has to hold stays apart.

~(future | padding)        ->  ~future & ~padding
~(cached & hidden)         ->  ~cached | ~hidden
~~padding                  ->  padding

and what numbers become that each take one of two constants by a condition, case by case.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch.fx import Node

from .elements import Element, dtype_of_element

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


class Cases(NamedTuple):
    """Constants that an element takes by two conditions: where both hold, the first alone, the second alone, none."""

    first: Node
    second: Node
    values: tuple[Element, ...]


def tabulate(
    nodes: Sequence[Node],
    choices: Mapping[Node, tuple[Node, Element, Element]],
    known: Mapping[Node, Cases],
    run: Callable[[Sequence[Element]], Element],
) -> Cases | None:
    """Return what an operation gives for each case of its operands; None if they have none, or it isn't finite.

    Args:
        nodes: The operands that are no constants.
        choices: Of nodes that take one of two constants: the condition, the value if it holds, the value if not.
        known: Of nodes that take one of more.
        run: Computes the operation on constants in place of the nodes.
    """
    if len(nodes) == 1 and nodes[0] in known:
        first, second, values = known[nodes[0]]
        inputs: list[tuple[Element, ...]] = [(value,) for value in values]
    elif len(nodes) == 2 and all(node in choices for node in nodes):
        (first, *of_first), (second, *of_second) = (choices[node] for node in nodes)
        inputs = list(itertools.product(of_first, of_second))
    else:
        return None
    cases = Cases(first, second, tuple(map(run, inputs)))
    return cases if all(math.isfinite(cast("float", value)) for value in cases.values) else None
