"""Take a lifted logit apart into a mask, a scale, a softcap and a bias.

    where((key <= query) & pad[batch, key], softcap * tanh(score * scale / softcap), -inf) + bias[head] * (key - query)

has all four. A logit that is composed otherwise is refused. FlexAttention takes the mask as its mask_mod, softcap and
bias as its score_mod; the estimators take each.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node

from ..graph.trace import ancestors_of
from .elements import (
    INDEX_NAMES,
    Capture,
    Element,
    LiftedElement,
    NotLiftableError,
    is_negation,
    is_read_by_pair,
)

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class ElementFunction:
    """A function of (batch, head, query, key, *captures).

    Attributes:
        module: Of elementwise ATen operations.
        captures: What to pass for its further placeholders.
    """

    module: GraphModule
    captures: tuple[Capture, ...]


@dataclasses.dataclass(frozen=True)
class ScoreParts:
    """softmax over the pairs of ``mask`` of softcap(scale * score) + bias.

    Attributes:
        mask: True where a query sees a key; None is everywhere.
        bias: What is added to the scaled and capped score; None is nothing.
        scale: The factor on the product of query and key.
        softcap: c of c * tanh(x / c); None is no cap.
    """

    mask: ElementFunction | None
    bias: ElementFunction | None
    scale: float
    softcap: float | None


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

    def finish(self, scale: float, softcap: float | None) -> ScoreParts:
        mask = self._combine(aten.bitwise_and.Tensor, self.masks)
        bias = self._combine(aten.add.Tensor, self.addends)
        return ScoreParts(self._extract(mask), self._extract(bias), scale, softcap)

    # The chain from the softmax's input to the score

    def split_score(self, element: Element) -> tuple[float, float | None]:
        """Collect masks and addends; return scale and softcap."""
        factor, element = self._split_chain(element)
        if element is self.score:
            return factor, None
        if isinstance(element, Node) and element.target is aten.tanh.default:
            num_addends = len(self.masks) + len(self.addends)
            inner_factor, inner = self._split_chain(element.args[0])  # type: ignore[arg-type]
            if inner is self.score and len(self.masks) + len(self.addends) == num_addends:
                return factor * inner_factor, factor
        raise NotLiftableError("the scores go through more than scale, softcap, bias and mask")

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
        return (
            condition.args[0]
            if is_negation(condition)
            else self.graph.call_function(aten.logical_not.default, (condition,))
        )

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
        for node in self._in_order(needed):
            if node.op == "call_function":
                copies[node] = graph.node_copy(node, lambda argument: copies[argument])
        graph.output(copies[element])
        return ElementFunction(GraphModule({}, graph), tuple(captures))

    def _in_order(self, nodes: set[Node]) -> list[Node]:
        return [node for node in self.graph.nodes if node in nodes]
