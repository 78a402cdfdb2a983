"""The graph of one element, while it is written: elementwise operations, simplified where constants decide them.

where(key <= query, 0, -inf) * 2        ->  where(key <= query, 0, -inf)
where(key <= query, True, False)        ->  key <= query
~~pad[batch, key] & True                ->  pad[batch, key]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from .constants import compute, dtype_of
from .elements import INDEX_NAMES, Element, Indices, is_negation

aten = torch.ops.aten

_COMPARISONS = {
    aten.lt: aten.gt,
    aten.gt: aten.lt,
    aten.le: aten.ge,
    aten.ge: aten.le,
    aten.eq: aten.eq,
    aten.ne: aten.ne,
}
# Overloads that take a number in place of any tensor but the first.
_TENSOR_FIRST = frozenset(
    {
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.bitwise_and.Tensor,
        aten.bitwise_or.Tensor,
    }
)


class Formula:
    """Writes the graph of one element.

    Attributes:
        graph: Its placeholders are score, batch, head, query and key, then the captures.
        score: The placeholder of the product of a query and a key.
        batch: The placeholder of an index; ``head``, ``query`` and ``key`` likewise.
    """

    def __init__(self) -> None:
        self.graph = Graph()
        self.score = self.graph.placeholder("score")
        self.batch, self.head, self.query, self.key = (self.graph.placeholder(name) for name in INDEX_NAMES)
        # Nodes that take one of two constants: the condition, the value if it holds, the value if not.
        self._choices: dict[Node, tuple[Node, Element, Element]] = {}
        self._dependence: dict[Node, frozenset[Node]] = {
            self.query: frozenset({self.query}),
            self.key: frozenset({self.key}),
        }

    @property
    def indices(self) -> tuple[Node, Node, Node, Node]:
        """The placeholders of batch, head, query and key."""
        return self.batch, self.head, self.query, self.key

    def add_capture(self) -> Node:
        """Add a placeholder behind the others."""
        placeholders = self.graph.find_nodes(op="placeholder")
        with self.graph.inserting_after(placeholders[-1]):
            return self.graph.placeholder(f"capture_{len(placeholders) - len(INDEX_NAMES)}")

    def read(self, captured: Node, indices: Indices) -> Node:
        """Return the element of a capture at the indices that are no constants."""
        entries = [index for index in indices if isinstance(index, Node)]
        return self._call(aten.index.Tensor, [captured, entries], {}) if entries else captured

    def depends_on_pair(self, indices: Indices) -> bool:
        """Tell whether the query goes into one index and the key into another, or both into several."""
        return sum(bool(self._depends(index)) for index in indices) > 1

    def cast(self, element: Element, dtype: torch.dtype, target: torch.dtype) -> Element:
        """Convert an element of ``dtype``."""
        if dtype == target:
            return element
        if dtype == torch.bool and isinstance(element, Node):
            return self._choose(element, 1, 0, target)
        return self.emit(aten._to_copy.default, [element], {"dtype": target}, target)

    def emit(self, target: Any, arguments: Sequence[Any], keywords: dict[str, Any], dtype: torch.dtype) -> Element:
        """Add an elementwise operation on elements, simplified where constants decide it."""
        simplified: Element | None = self._simplify(target, arguments, dtype)
        if simplified is not None:
            return simplified
        if target is aten.where.self and not isinstance(arguments[1], Node) and not isinstance(arguments[2], Node):
            return self._choose(arguments[0], arguments[1], arguments[2], dtype)
        if not any(isinstance(a, Node) for a in arguments):
            return compute(target, arguments, keywords, dtype)
        chosen = [a for a in arguments if isinstance(a, Node)]
        if len(chosen) == 1 and chosen[0] in self._choices and target is not aten.where.self:
            condition, *values = self._choices[chosen[0]]
            if_true, if_false = (
                compute(target, [value if a is chosen[0] else a for a in arguments], keywords, dtype)
                for value in values
            )
            return self._choose(condition, if_true, if_false, dtype)
        return self._call(target, arguments, keywords)

    def _simplify(self, target: Any, arguments: Sequence[Any], dtype: torch.dtype) -> Any:
        packet = getattr(target, "overloadpacket", None)
        first, second = (*arguments, None, None)[:2]
        if packet in (aten.bitwise_and, aten.bitwise_or) and dtype == torch.bool:
            for constant, other in ((first, second), (second, first)):
                if isinstance(constant, bool):
                    return other if constant is (packet is aten.bitwise_and) else constant
        if packet in (aten.add, aten.sub) and isinstance(second, int) and second == 0 and isinstance(first, Node):
            return first
        if target is aten.where.self and isinstance(first, bool):
            return arguments[1] if first else arguments[2]
        if packet in (aten.bitwise_not, aten.logical_not) and isinstance(first, Node):
            return self._negate(first) if packet is aten.logical_not or is_negation(first) else None
        return None

    def _negate(self, condition: Node) -> Node:
        if is_negation(condition):
            return condition.all_input_nodes[0]
        return self._call(aten.logical_not.default, [condition], {})

    def _choose(self, condition: Node, if_true: Element, if_false: Element, dtype: torch.dtype) -> Element:
        """Return what takes one of two constants; a condition itself, where they are booleans."""
        if if_true == if_false:
            return if_true
        if dtype == torch.bool:
            return condition if if_true else self._negate(condition)
        choice = self._call(
            aten.where.self, [condition, self._constant(if_true, dtype), self._constant(if_false, dtype)], {}
        )
        self._choices[choice] = (condition, if_true, if_false)
        return choice

    def _constant(self, value: Element, dtype: torch.dtype) -> Node:
        """Make a tensor of a constant, on the device of the indices."""
        if isinstance(value, Node):
            return value
        return self._call(aten.full_like.default, [self.query, value], {"dtype": dtype})

    def _call(self, target: Any, arguments: Sequence[Any], keywords: dict[str, Any]) -> Node:
        overloads = target.overloadpacket
        if len(arguments) == 2 and overloads in _COMPARISONS and not all(isinstance(a, Node) for a in arguments):
            if not isinstance(arguments[0], Node):
                overloads, arguments = _COMPARISONS[overloads], arguments[::-1]
            target = overloads.Scalar
        else:
            arguments = [
                self._constant(a, dtype_of(a))
                if isinstance(a, bool | int | float) and _takes_tensor(target, position)
                else a
                for position, a in enumerate(arguments)
            ]
        node = self.graph.call_function(target, tuple(arguments), keywords)
        flat = [x for a in arguments for x in (a if isinstance(a, list | tuple) else [a])]
        self._dependence[node] = frozenset().union(*(self._depends(a) for a in flat))
        return node

    def _depends(self, element: Any) -> frozenset[Node]:
        return self._dependence.get(element, frozenset()) if isinstance(element, Node) else frozenset()

    def select(self, condition: Element, if_true: Element, if_false: Element, dtype: torch.dtype) -> Element:
        """Add ``where`` on a condition that may be a constant."""
        return self.emit(aten.where.self, [condition, if_true, if_false], {}, dtype)

    def is_position(self, element: Element) -> bool:
        """Tell whether an element is known not to be negative."""
        return (isinstance(element, int) and element >= 0) or element in self.indices


def _takes_tensor(target: Any, position: int) -> bool:
    if target in _TENSOR_FIRST:
        return position == 0
    return isinstance(target._schema.arguments[position].type, torch.TensorType)
