"""Prove facts of a lifted mask with sympy: whether it is causal or packed, and where its queries stand.

    (key <= query + capture_1) & (capture_2[batch, key] == capture_2[batch, query])    causal, offset capture_1, packed

A mask is a conjunction; each comparison in it is brought to the form ``0 <= f(query, key)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from ..graph.trace import ancestors_of
from .elements import is_read_by_pair
from .score_parts import ElementFunction

aten = torch.ops.aten
QUERY, KEY = sympy.symbols("query key", integer=True)

_AND = (aten.bitwise_and, aten.logical_and)
_NOT = (aten.bitwise_not, aten.logical_not)
# f(lhs, rhs) >= 0 if and only if the comparison of integers holds.
_MARGINS: dict[Any, Callable[[Any, Any], Any]] = {
    aten.le: lambda lhs, rhs: rhs - lhs,
    aten.lt: lambda lhs, rhs: rhs - lhs - 1,
    aten.ge: lambda lhs, rhs: lhs - rhs,
    aten.gt: lambda lhs, rhs: lhs - rhs - 1,
}
_OPPOSITE = {aten.le: aten.gt, aten.gt: aten.le, aten.lt: aten.ge, aten.ge: aten.lt}
_ARITHMETIC: dict[Any, Callable[..., Any]] = {
    aten.add: lambda a, b: a + b,
    aten.sub: lambda a, b: a - b,
    aten.mul: lambda a, b: a * b,
    aten.neg: lambda a: -a,
    aten.floor_divide: sympy.Function("floor_divide"),
}


@dataclasses.dataclass(frozen=True)
class MaskBounds:
    """What is known of a mask.

    Attributes:
        is_causal: No query sees a later key: its own position comes last.
        offset: How many keys come before the first query, in terms of symbols named as the captures; None if the
            formula doesn't say, where positions are data.
        is_packed: Something of the query has to equal something of the key: several sequences may share a row.
        is_given: Part of it is read from a mask that exists at run time.
        is_plain: It is ``key <= query`` and nothing else.
    """

    is_causal: bool
    offset: sympy.Expr | None
    is_packed: bool
    is_given: bool
    is_plain: bool

    def compute_offset(self, mask: ElementFunction, captures: Sequence[Any], otherwise: Any) -> Any:
        """Evaluate ``offset`` on the values of the mask's captures; return ``otherwise`` where it isn't known."""
        if self.offset is None:
            return otherwise
        symbols = sorted(self.offset.free_symbols, key=str)
        values = dict(zip(_capture_names(mask), captures, strict=True))
        return sympy.lambdify(symbols, self.offset, modules=[])(*(values[str(symbol)] for symbol in symbols))


def find_bounds(mask: ElementFunction) -> MaskBounds:
    """Read the bounds off a mask's graph."""
    (output,) = mask.module.graph.output_node().all_input_nodes
    expressions = _Expressions()
    conjuncts = list(_conjuncts(output))
    margins = [margin for node in conjuncts if (margin := expressions.margin_of(node)) is not None]
    positions = [offset for margin in margins if (offset := _offset_of(margin)) is not None]
    return MaskBounds(
        is_causal=bool(positions) or any(map(_orders_values, margins)),
        offset=positions[0] if positions else None,
        is_packed=any(expressions.is_equality_of_sides(node) for node in conjuncts),
        is_given=any(map(is_read_by_pair, ancestors_of(output))),
        is_plain=len(conjuncts) == 1 and positions == [0],
    )


def _conjuncts(node: Node) -> Iterator[Node]:
    if _packet(node) in _AND:
        for part in node.all_input_nodes:
            yield from _conjuncts(part)
    else:
        yield node


def _packet(node: Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _offset_of(margin: sympy.Expr) -> sympy.Expr | None:
    """Return c if the margin is query + c - key, with c the same for every pair."""
    offset = sympy.expand(margin - QUERY + KEY)
    is_scalar = all(symbol.name.startswith("capture") for symbol in offset.free_symbols)
    return offset if is_scalar and not offset.atoms(sympy.core.function.AppliedUndef) else None


def _orders_values(margin: sympy.Expr) -> bool:
    """Tell whether the margin is f(query) - f(key), with f a capture: positions that are data."""
    functions = margin.atoms(sympy.core.function.AppliedUndef)
    if len(functions) != 2:
        return False
    of_query = [f for f in functions if QUERY in f.free_symbols]
    if len(of_query) != 1:
        return False
    return bool(sympy.expand(margin - of_query[0] + of_query[0].subs(QUERY, KEY)) == 0)


def _capture_names(mask: ElementFunction) -> list[str]:
    return [node.name for node in mask.module.graph.find_nodes(op="placeholder") if node.name.startswith("capture")]


class _Expressions:
    """Nodes as sympy expressions; what has none becomes a symbol of its own."""

    def margin_of(self, node: Node) -> sympy.Expr | None:
        """Return f such that an integer comparison holds where f >= 0; None if it is no such comparison."""
        packet = _packet(node)
        if packet in _NOT:
            (inner,) = node.all_input_nodes
            packet, node = _OPPOSITE.get(_packet(inner)), inner
        if packet not in _MARGINS:
            return None
        return _MARGINS[packet](*map(self.expression_of, node.args))

    def is_equality_of_sides(self, node: Node) -> bool:
        """Tell whether a condition equates an expression of the query with one of the key."""
        if _packet(node) is not aten.eq:
            return False
        sides = [self.expression_of(a).free_symbols & {QUERY, KEY} for a in node.args]
        return sorted(map(len, sides)) == [1, 1] and sides[0] != sides[1]

    def expression_of(self, argument: Any) -> sympy.Expr:
        """Return the expression of a node or a constant."""
        if not isinstance(argument, Node):
            return sympy.sympify(argument)
        if argument.op == "placeholder":
            return {"query": QUERY, "key": KEY}.get(argument.name, sympy.Symbol(argument.name, integer=True))
        packet = _packet(argument)
        if packet is aten._to_copy:
            return self.expression_of(argument.args[0])
        if packet is aten.full_like:
            return sympy.sympify(argument.args[1])
        if packet in _ARITHMETIC and not argument.kwargs:
            return sympy.sympify(_ARITHMETIC[packet](*map(self.expression_of, argument.args)))
        # A capture at some index, or an operation without a rule: an unknown function of what goes into it.
        inputs = argument.args[1] if packet is aten.index else argument.all_input_nodes
        name = str(argument.args[0]) if packet is aten.index else argument.name
        return sympy.Function(name)(*map(self.expression_of, inputs))  # type: ignore[arg-type]
