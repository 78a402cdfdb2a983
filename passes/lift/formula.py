"""The graph of one element, while it is written: elementwise operations, simplified where constants decide them.

where(key <= query, 0, -inf) * 2        ->  where(key <= query, 0, -inf)
where(key <= query, True, False)        ->  key <= query
~~pad[batch, key] & True                ->  pad[batch, key]
(key <= query) * pad[batch, key]        ->  (key <= query) & pad[batch, key]
where(a, 1, 0) + where(b, 1, 0) == 2    ->  a & b
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .conditions import NEGATIONS, Cases, negate, tabulate
from .constants import compute, dtype_of
from .elements import INDEX_NAMES, POSITION_DTYPES, Element, Indices, NoRuleError, NotLiftableError, dtype_of_element

aten = torch.ops.aten

_COMPARISONS = {
    aten.lt: aten.gt,
    aten.gt: aten.lt,
    aten.le: aten.ge,
    aten.ge: aten.le,
    aten.eq: aten.eq,
    aten.ne: aten.ne,
}
# What arithmetic of booleans is.
_LOGIC = {aten.mul: aten.bitwise_and.Tensor, aten.add: aten.bitwise_or.Tensor}
# They give a number for any numbers, and are computed for each case of what they take.
_BY_CASE = frozenset({*_COMPARISONS, *_LOGIC, aten.sub, aten.rsub, aten.neg, aten.logical_not, aten._to_copy})
# They round nothing.
_EXACT = frozenset({aten.where, aten.neg, aten.abs, aten.minimum, aten.maximum, aten.clamp, aten.index})
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
        # Nodes that take one of more than two.
        self._cases: dict[Node, Cases] = {}
        # Nodes whose numbers the model rounds to a dtype in which the compiled formula may not.
        self._rounded: set[Node] = set()
        # Indices that may be beyond what they index, and what depends on them.
        self._held_back: set[Node] = set()
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

    def hold_back(self, index: Element) -> Element:
        """Return an index under which nothing is read but at a place that exists."""
        if not isinstance(index, Node):
            return max(int(index), 0)
        held = self._call(aten.mul.Tensor, [index, 1], {}, torch.int64)  # a node of its own
        self._held_back.add(held)
        return held

    def read(self, captured: Node, indices: Indices, example: Tensor | None) -> Node:
        """Return the element of a capture at the indices that are no constants.

        Args:
            captured: The placeholder.
            indices: One for each of its dimensions.
            example: Of the capture, None for a number.

        Raises:
            NoRuleError: An index may be beyond a dimension whose size isn't known.
        """
        dtype = torch.int64 if example is None else example.dtype
        captured.meta["dtype"] = dtype
        sizes = () if example is None else example.shape
        entries = [self._bring_back(i, n) for i, n in zip(indices, sizes, strict=True) if isinstance(i, Node)]
        return self._call(aten.index.Tensor, [captured, entries], {}, dtype) if entries else captured

    def _bring_back(self, index: Node, size: Any) -> Node:
        if index not in self._held_back:
            return index
        if not isinstance(size, int):
            raise NoRuleError("it joins tensors whose sizes are not known")
        return self._call(aten.clamp.default, [index, 0, size - 1], {}, torch.int64)

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

    def is_narrowed(self, element: Element, dtype: torch.dtype, target: torch.dtype) -> bool:
        """Tell whether a conversion may round an element or wrap it around: choices of constants do so here."""
        is_open = isinstance(element, Node) and element not in self._choices
        keeps_kind = dtype.is_floating_point == target.is_floating_point
        holds_all = dtype == torch.bool or (keeps_kind and torch.promote_types(dtype, target) == target)
        return is_open and target not in POSITION_DTYPES and target != torch.bool and not holds_all

    def emit(self, target: Any, arguments: Sequence[Any], keywords: dict[str, Any], dtype: torch.dtype) -> Element:
        """Add an elementwise operation on elements, simplified where constants decide it."""
        if dtype == torch.bool and not keywords:
            target = _LOGIC.get(target.overloadpacket, target)
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
        cases = self._tabulate(target, arguments, keywords, dtype)
        if cases is not None and len(set(cases.values)) <= 2:
            return self._choose_case(cases, dtype)
        if target.overloadpacket in _COMPARISONS and self._rounded.intersection(chosen):
            raise NotLiftableError("it compares numbers that a low precision rounds")
        node = self._call(target, arguments, keywords, dtype)
        is_narrow = dtype.is_floating_point and dtype not in POSITION_DTYPES
        if (is_narrow and target.overloadpacket not in _EXACT) or self._rounded.intersection(chosen):
            self._rounded.add(node)
        if cases is not None:
            self._cases[node] = cases
        return node

    def _tabulate(
        self, target: Any, arguments: Sequence[Any], keywords: dict[str, Any], dtype: torch.dtype
    ) -> Cases | None:
        """Compute an operation on two choices, or on what such an operation gave, for each case."""
        nodes = list(dict.fromkeys(self._nodes_of(arguments)))
        if target.overloadpacket not in _BY_CASE:
            return None

        def run(case: Sequence[Element]) -> Element:
            return compute(target, [case[nodes.index(a)] if a in nodes else a for a in arguments], keywords, dtype)

        return tabulate(nodes, self._choices, self._cases, run)

    def _choose_case(self, cases: Cases, dtype: torch.dtype) -> Element:
        """Return what takes one of two constants by two conditions."""
        one, *others = cases.values
        other = next((value for value in others if value != one), one)
        if one == other:
            return one
        both, alone, second, none = (value == one for value in cases.values)
        sides = (self._either(cases.second, *side) for side in ((both, alone), (second, none)))
        return self._choose(cast("Node", self._either(cases.first, *sides)), one, other, dtype)

    def _simplify(self, target: Any, arguments: Sequence[Any], dtype: torch.dtype) -> Any:
        packet = getattr(target, "overloadpacket", None)
        first, second = (*arguments, None, None)[:2]
        if packet in (aten.bitwise_and, aten.bitwise_or) and dtype == torch.bool:
            for constant, other in ((first, second), (second, first)):
                if isinstance(constant, bool):
                    return other if constant is (packet is aten.bitwise_and) else constant
        if packet in (aten.add, aten.sub) and isinstance(second, int) and second == 0 and isinstance(first, Node):
            return first
        if target is aten.where.self:
            return self._simplify_choice(*arguments[:3], dtype=dtype)
        if packet in NEGATIONS and isinstance(first, Node) and dtype == torch.bool:
            return self._negate(first)
        if packet in (aten.eq, aten.ne) and isinstance(first, Node) and isinstance(second, bool | int | float):
            is_condition = dtype_of_element(first) == torch.bool and second in (0, 1)
            return None if not is_condition else first if (second == 1) is (packet is aten.eq) else self._negate(first)
        return None

    def _simplify_choice(self, condition: Element, if_true: Element, if_false: Element, *, dtype: torch.dtype) -> Any:
        if isinstance(condition, bool):
            return if_true if condition else if_false
        return self._either(cast("Node", condition), if_true, if_false) if dtype == torch.bool else None

    def _either(self, condition: Node, if_true: Element, if_false: Element) -> Element:
        """Write a choice of conditions as what has to hold: (~condition | if_true) & (condition | if_false)."""
        if if_true is if_false:
            return if_true
        for guard, here, there in ((condition, if_true, if_false), (self._negate(condition), if_false, if_true)):
            if isinstance(here, bool):
                target = aten.bitwise_or.Tensor if here else aten.bitwise_and.Tensor
                return self.emit(target, [guard if here else self._negate(guard), there], {}, torch.bool)
        sides = [
            self.emit(aten.bitwise_or.Tensor, [guard, side], {}, torch.bool)
            for guard, side in ((self._negate(condition), if_true), (condition, if_false))
        ]
        return self.emit(aten.bitwise_and.Tensor, sides, {}, torch.bool)

    def _negate(self, condition: Node) -> Node:
        return negate(condition, lambda target, inputs: self._call(target, inputs, {}, torch.bool))

    def _choose(self, condition: Node, if_true: Element, if_false: Element, dtype: torch.dtype) -> Element:
        """Return what takes one of two constants; a condition itself, where they are booleans."""
        if if_true == if_false:
            return if_true
        if dtype == torch.bool:
            return condition if if_true else self._negate(condition)
        choice = self._call(
            aten.where.self, [condition, self._constant(if_true, dtype), self._constant(if_false, dtype)], {}, dtype
        )
        self._choices[choice] = (condition, if_true, if_false)
        return choice

    def _constant(self, value: Element, dtype: torch.dtype) -> Node:
        """Make a tensor of a constant, on the device of the indices."""
        if isinstance(value, Node):
            return value
        return self._call(aten.full_like.default, [self.query, value], {"dtype": dtype}, dtype)

    def _call(self, target: Any, arguments: Sequence[Any], keywords: dict[str, Any], dtype: torch.dtype) -> Node:
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
        node.meta["dtype"] = dtype
        flat = [x for a in arguments for x in (a if isinstance(a, list | tuple) else [a])]
        if (
            self._held_back.intersection(x for x in flat if isinstance(x, Node))
            and target.overloadpacket is not aten.index
        ):
            self._held_back.add(node)
        self._dependence[node] = frozenset().union(*(self._depends(a) for a in flat))
        return node

    @staticmethod
    def _nodes_of(arguments: Sequence[Any]) -> list[Node]:
        return [argument for argument in arguments if isinstance(argument, Node)]

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
