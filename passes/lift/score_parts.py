"""Take a lifted logit apart into a mask, a scale, a softcap and a bias.

    where((key <= query) & pad[batch, key], softcap * tanh(score * scale / softcap), -inf) + bias[head] * (key - query)

has all four. A logit that is composed otherwise is refused. FlexAttention takes the mask as its mask_mod, softcap and
bias as its score_mod; the estimators take each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node

from ..graph.trace import ancestors_of
from .conditions import negate
from .elements import (
    INDEX_NAMES,
    Capture,
    Element,
    ElementFunction,
    LiftedElement,
    NotLiftableError,
    is_read_by_pair,
)

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class ScoreParts:
    """softmax over the pairs of ``mask`` of softcap(scale * score) + bias.

    Attributes:
        mask: True where a query sees a key; None is everywhere.
        bias: What is added to the scaled and capped score; None is nothing.
        scale: The factor on the product of query and key.
        softcap: c of c * tanh(x / c); None is no cap.
        temperature: A further factor on the product, read at run time: of batch, head and query; None is 1.
    """

    mask: ElementFunction | None
    bias: ElementFunction | None
    scale: float
    softcap: float | None
    temperature: ElementFunction | None = None


def split_mask(lifted: LiftedElement, dtype: torch.dtype, scale: float) -> ScoreParts:
    """Take apart the attn_mask of a scaled_dot_product_attention: boolean, or added to the scaled scores."""
    splitter = _Splitter(lifted, dtype)
    if dtype == torch.bool:
        splitter.add_mask(lifted.element)
    else:
        splitter.split_addend(lifted.element)
    return splitter.finish(scale, None)


def split_logit(lifted: LiftedElement, dtype: torch.dtype) -> ScoreParts:
    """Take apart what stands between the product of queries and keys and the softmax.

    Raises:
        NotLiftableError: The score goes through something other than scale, softcap, bias and mask.
    """
    splitter = _Splitter(lifted, dtype)
    scale, softcap = splitter.split_score(lifted.element)
    return splitter.finish(scale, softcap)


class _Splitter:
    def __init__(self, lifted: LiftedElement, dtype: torch.dtype) -> None:
        self.lifted = lifted
        self.graph = lifted.graph
        self.score = self.graph.find_nodes(op="placeholder")[0]
        # A number this low hides a key as -inf does, except where it hides all keys of a query.
        self.lowest = -math.inf if dtype == torch.bool else torch.finfo(dtype).min
        self.masks: list[Node] = []
        self.addends: list[Node] = []
        self.temperatures: list[Node] = []

    def finish(self, scale: float, softcap: float | None) -> ScoreParts:
        mask = self._combine(aten.bitwise_and.Tensor, self.masks)
        bias = self._combine(aten.add.Tensor, self.addends)
        temperature = self._combine(aten.mul.Tensor, self.temperatures)
        return ScoreParts(self._extract(mask), self._extract(bias), scale, softcap, self._extract(temperature))

    # The chain from the softmax's input to the score

    def split_score(self, element: Element) -> tuple[float, float | None]:
        """Collect masks and addends; return scale and softcap."""
        factor, element = self._split_chain(element)
        is_capped = isinstance(element, Node) and element.target is aten.tanh.default
        inner_factor = self._split_product(element.args[0] if is_capped else element)  # type: ignore[union-attr]
        if inner_factor is not None:
            return factor * inner_factor, factor if is_capped else None
        raise NotLiftableError("the scores go through more than scale, softcap, bias and mask")

    def _split_product(self, element: Any) -> float | None:
        """Take off factors and casts down to the score; return the product of the constant ones, None for more."""
        factor = 1.0
        while isinstance(element, Node) and element is not self.score:
            own_factor, inner = self._split_factor(element)
            if inner is element:
                inner = element.args[0] if element.target is aten._to_copy.default else self._split_temperature(element)
            factor, element = factor * own_factor, inner
        return factor if element is self.score else None

    def _split_temperature(self, node: Node) -> Any:
        """Take off a factor that is data, the same for all keys of a query; return what is inside, or None."""
        if node.target not in (aten.mul.Tensor, aten.div.Tensor):
            return None
        first, second = node.args
        if node.target is aten.mul.Tensor and self._has_score(second):
            first, second = second, first
        if not self._has_score(first) or not isinstance(second, Node):
            return None
        names = {ancestor.name for ancestor in ancestors_of(second)}
        if names & {"score", "key"}:
            return None
        is_product = node.target is aten.mul.Tensor
        self.temperatures.append(second if is_product else self.graph.call_function(aten.reciprocal.default, (second,)))
        return first

    def _split_chain(self, element: Element) -> tuple[float, Element]:
        """Take off masks, addends, casts and factors; return the product of the factors and what is left."""
        factor = 1.0
        while isinstance(element, Node) and element is not self.score:
            own_factor, inner = self._split_factor(element)
            if inner is element:
                inner = self._peel(element, factor)
            if inner is None:
                break
            factor, element = factor * own_factor, inner
        return factor, element

    def _peel(self, node: Node, factor: float) -> Any:
        """Take off the outermost mask, addend or cast, which ``factor`` scales; return what is inside, or None."""
        if node.target is aten._to_copy.default:
            return node.args[0]
        if node.target is aten.where.self and factor > 0:
            return self._split_where(node)
        if node.target in (aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
            first, second = node.args
            sign = 1.0 if node.target is aten.add.Tensor else -1.0
            if self._has_score(first):
                self.split_addend(self._scale(second, sign * factor))
                return first
            if self._has_score(second) and sign == 1:
                self.split_addend(self._scale(first, factor))
                return second
        return None

    def _split_where(self, node: Node) -> Any:
        """Turn where(condition, x, -inf) into a mask; return x, or None if neither branch hides the key."""
        condition, if_true, if_false = cast("Any", node.args)
        if self._is_lowest(if_false):
            self.masks.append(condition)
            return self._value_of(if_true)
        if self._is_lowest(if_true):
            self.masks.append(self._negate(condition))
            return self._value_of(if_false)
        return None

    def _split_joined(self, node: Node) -> bool:
        """Take where(condition, x, y) apart, the sides of which hide keys and add nothing: parts of a mask, joined."""
        condition, *sides = cast("Any", node.args)
        visible = [self._visible(side) for side in sides]
        if None in visible:
            return False
        for guard, side in zip((self._negate(condition), condition), visible, strict=True):
            if isinstance(side, Node):
                self.masks.append(self._call_on_conditions(aten.bitwise_or.Tensor, (guard, side)))
            elif not side:
                self.masks.append(guard)
        return True

    def _visible(self, element: Any) -> Node | bool | None:
        """Return where what is 0 or lowest everywhere is 0; None for another number or a score."""
        value = self._value_of(element)
        if isinstance(value, int | float):
            return True if value == 0 else False if self._is_lowest(value) else None
        if value.target is not aten.where.self:
            return None
        condition, *sides = value.args
        first, second = map(self._visible, sides)
        if first is True and second is False:
            return cast("Node", condition)
        return self._negate(condition) if first is False and second is True else None

    def _split_factor(self, node: Node) -> tuple[float, Any]:
        """Return c and x of c * x or x / (1 / c), or 1 and the node itself."""
        if node.target not in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
            return 1.0, node
        first, second = map(self._value_of, node.args)
        is_product = node.target in (aten.mul.Tensor, aten.mul.Scalar)
        if is_product and isinstance(first, int | float):
            first, second = second, first
        if not isinstance(second, int | float) or not isinstance(first, Node):
            return 1.0, node
        return (float(second) if is_product else 1 / second), first

    # What is added to the score

    def split_addend(self, element: Element) -> None:
        """Collect the masks and the biases of a sum."""
        if not isinstance(element, Node):
            if element:
                raise NotLiftableError(f"the constant {element} is added to every score")
        elif element.target is aten.add.Tensor and not element.kwargs:
            for part in element.args:
                self.split_addend(part)  # type: ignore[arg-type]
        elif (
            element.target is aten._to_copy.default
            and isinstance(element.args[0], Node)
            and element.args[0].target in (aten.where.self, aten.add.Tensor)
        ):
            self.split_addend(element.args[0])
        elif element.target is aten.where.self and (rest := self._split_where(element)) is not None:
            self.split_addend(rest)
        elif element.target is aten.where.self and self._split_joined(element):
            pass
        elif element.target is aten.full_like.default:
            self.split_addend(self._value_of(element))
        else:
            if is_read_by_pair(element):
                self.masks.append(self.graph.call_function(aten.gt.Scalar, (element, self.lowest)))
            self.addends.append(element)

    def add_mask(self, element: Element) -> None:
        """Collect a condition; a constant True is no mask."""
        if isinstance(element, Node):
            self.masks.append(element)
        elif not element:
            raise NotLiftableError("no query sees any key")

    # Helpers

    def _is_lowest(self, element: Any) -> bool:
        value = self._value_of(element)
        return isinstance(value, int | float) and value <= self.lowest

    def _value_of(self, element: Any) -> Any:
        """Return the constant that a node stands for, or the node."""
        if isinstance(element, Node) and element.target is aten.full_like.default:
            return element.args[1]
        return element

    def _has_score(self, element: Any) -> bool:
        return isinstance(element, Node) and self.score in ancestors_of(element)

    def _scale(self, element: Any, factor: float) -> Any:
        value = self._value_of(element)
        if not isinstance(value, Node):
            return value * factor
        return value if factor == 1 else self.graph.call_function(aten.mul.Tensor, (value, factor))

    def _negate(self, condition: Any) -> Node:
        return negate(condition, self._call_on_conditions)

    def _call_on_conditions(self, target: Any, conditions: Sequence[Node]) -> Node:
        node = self.graph.call_function(target, tuple(conditions))
        node.meta["dtype"] = torch.bool
        return node

    def _combine(self, target: Any, nodes: list[Node]) -> Node | None:
        combined = None
        for node in nodes:
            combined = node if combined is None else self.graph.call_function(target, (combined, node))
        return combined

    def _extract(self, element: Node | None) -> ElementFunction | None:
        """Copy what computes an element into a module of its own, with the captures that it reads."""
        if element is None:
            return None
        needed = ancestors_of(element)
        if self.score in needed:
            raise NotLiftableError("a mask or a bias depends on the scores")
        graph = Graph()
        copies = {
            node: graph.placeholder(node.name)
            for node in self.graph.find_nodes(op="placeholder")
            if node.name in INDEX_NAMES
        }
        captures: list[Capture] = []
        for node in self.graph.nodes:
            if node in self.lifted.captures and node in needed:
                copies[node] = graph.placeholder(f"capture_{len(captures) + 1}")
                captures.append(self.lifted.captures[node])
        for node in self.graph.nodes:
            if node in needed and node.op == "call_function":
                copies[node] = graph.node_copy(node, lambda argument: copies[argument])
        graph.output(copies[element])
        return ElementFunction(GraphModule({}, graph), tuple(captures))
