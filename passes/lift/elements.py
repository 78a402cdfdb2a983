"""What a lifted formula is made of: elements, their indices, and captures.

An element stands for one number of a tensor. Its indices say which.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..graph.trace import ancestors_of

aten = torch.ops.aten
# An element of a tensor, or an index of a dimension: a node of the lifted graph, or a constant.
Element = Node | bool | int | float
Indices = tuple[Element, ...]

INDEX_NAMES = ("batch", "head", "query", "key")


class NotLiftableError(Exception):
    """The tensor is no function of a pair's indices and of O(S) captures; the message says what stands in the way."""


class NoRuleError(Exception):
    """The rule of an operation doesn't cover these arguments; capture its result instead."""


@dataclasses.dataclass(frozen=True)
class Capture:
    """What a lifted graph reads at run time: a traced value, at constant positions in some dimensions.

    Attributes:
        node: Of the traced graph, a tensor or a size.
        positions: For each dimension a position, or None where the lifted graph gives an index.
    """

    node: Node
    positions: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class LiftedElement:
    """One element of a tensor, as a graph.

    Attributes:
        graph: Its placeholders are score, batch, head, query and key, then the captures.
        element: The node or constant of the element.
        captures: What each further placeholder stands for.
    """

    graph: Graph
    element: Element
    captures: dict[Node, Capture]


def broadcast(indices: Indices, operand: Tensor, result: Tensor) -> Indices:
    """Return the indices of an operand's element from those of the result's: the last dimensions."""
    return indices[len(result.shape) - len(operand.shape) :]


def is_negation(condition: Node) -> bool:
    """Tell whether a condition is ``not`` another one."""
    return condition.target in (aten.logical_not.default, aten.bitwise_not.default)


def is_read_by_pair(element: Node) -> bool:
    """Tell whether a lifted element is read from a tensor at both the query and the key."""
    if element.target is not aten.index.Tensor:
        return False
    entries: Any = element.args[1]
    names = [{node.name for node in ancestors_of(entry)} for entry in entries]
    return sum(bool({"query", "key"} & entry) for entry in names) > 1
