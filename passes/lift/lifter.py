"""Turn a tensor that a graph computes for every pair of query and key into a function of one pair.

    mask = (kv_index <= q_index) & pad[batch_index, kv_index]      (B, 1, S, S) bools: 16 GiB at 128k tokens

becomes

    mask_mod(batch, head, query, key, capture_1) = (key <= query) & capture_1[batch, key]

The walk starts at the last operation and follows the indices of one element into its operands. Elementwise operations
pass them on, views rearrange them, arange and full turn them into a value (view_rules.py, value_rules.py). A tensor
without a rule is captured, whole, if at most one of query and key indexes it: that is O(S) numbers (captures.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import SymInt, Tensor
from torch.fx import Node

from flexprefill_compile.torch_internals import statically_known_true

from ..graph.trace import TracedValue
from .captures import Captures
from .constants import promote
from .elements import Element, Indices, LiftedElement, NoRuleError, NotLiftableError, broadcast
from .formula import Formula

aten = torch.ops.aten


class Lifter:
    """Follows one element of a traced (B, H, Sq, Skv) tensor, or of one that broadcasts to it, and writes its formula.

    Attributes:
        traced: What computes the tensor.
        formula: What has been written.
        captures: What the formula reads at run time.
    """

    def __init__(self, traced: TracedValue, heads: int | None, largest_mask: int, rules: Mapping[Any, Rule]) -> None:
        """Prepare to lift.

        Args:
            traced: What computes the tensor.
            heads: H, if it depends on the products of queries and keys, which may merge batch and head.
            largest_mask: Most elements of a graph input that is captured although query and key both index it.
            rules: How an index goes through what isn't elementwise, by operation.
        """
        self.traced = traced
        self.formula = Formula()
        self.captures = Captures(self.formula, traced, largest_mask)
        self._heads = heads
        self._rules = rules
        self._merged: dict[Node, tuple[Indices, tuple[Any, ...]]] = {}
        self._memo: dict[tuple[Node, Indices], Element] = {}

    def lift(self) -> LiftedElement:
        """Lift the traced tensor.

        Raises:
            NotLiftableError: It can't be.
        """
        output = self.traced.output
        dims = len(output.meta["val"].shape)
        batch, head, query, key = self.formula.indices
        if dims == 3 and self._heads is not None:
            indices: Indices = (self.merge((batch, head), (None, self._heads)), query, key)
        elif dims <= 4:
            indices = self.formula.indices[4 - dims :]
        else:
            raise NotLiftableError(f"it has {dims} dimensions")
        element = self.element(output, indices)
        return LiftedElement(self.formula.graph, element, {new: old for old, new in self.captures.placeholders.items()})

    def element(self, node: Any, indices: Indices) -> Element:
        """Return the element of a traced tensor at ``indices``; of a number, the number."""
        if not isinstance(node, Node):
            return cast("Element", node)
        if node.op == "get_attr":
            return self._constant_tensor(node)
        example = node.meta["val"]
        if not isinstance(example, Tensor):
            return cast("Element", self._number(node))
        indices = tuple(
            0 if statically_known_true(size == 1) else index for index, size in zip(indices, example.shape, strict=True)
        )
        if (node, indices) not in self._memo:
            self._memo[node, indices] = self._lift_node(node, indices)
        return self._memo[node, indices]

    def _lift_node(self, node: Node, indices: Indices) -> Element:
        if node is self.traced.product:
            return self._read_score(indices)
        rule = self._rules.get(node.target)
        if rule is not None:
            try:
                return rule(self, node, indices)
            except NoRuleError:
                pass
        elif _is_elementwise(node.target):
            return self._lift_pointwise(node, indices)
        return self.captures.read(node, indices)

    def _read_score(self, indices: Indices) -> Element:
        *batch_and_head, query, key = indices
        (first,) = batch_and_head[:1]
        merged = self._merged.get(first) if isinstance(first, Node) else None
        parts = merged[0] if len(batch_and_head) == 1 and merged is not None else tuple(batch_and_head)
        given = (*parts, query, key)
        if len(parts) != 2 or any(i not in (own, 0) for i, own in zip(given, self.formula.indices, strict=True)):
            raise NotLiftableError("scores of several pairs enter one logit")
        return self.formula.score

    def _lift_pointwise(self, node: Node, indices: Indices) -> Element:
        example: Tensor = node.meta["val"]
        inputs: Sequence[Any] = node.args
        tensors = [a for a in inputs if isinstance(a, Node) and isinstance(a.meta["val"], Tensor)]
        operands = {a: self.element(a, broadcast(indices, a.meta["val"], example)) for a in tensors}
        arguments = [operands[a] if a in operands else self._number(a) for a in inputs]
        keywords = {k: self._number(v) for k, v in node.kwargs.items() if k not in ("device", "layout", "pin_memory")}
        values = tensors[1:] if node.target is aten.where.self else tensors  # a condition keeps its dtype
        if len({a.meta["val"].dtype for a in values}) > 1:
            arguments = self._promote_operands(inputs, arguments, values)
        return self.formula.emit(_out_of_place(node.target), arguments, keywords, example.dtype)

    def _promote_operands(self, inputs: Sequence[Any], arguments: Sequence[Any], values: Sequence[Node]) -> list[Any]:
        """Cast elements as their tensors are promoted: elements have no dimensions, so torch would decide otherwise."""
        dtype = promote(values)
        return [
            self.formula.cast(element, source.meta["val"].dtype, dtype) if source in values else element
            for source, element in zip(inputs, arguments, strict=True)
        ]

    def _number(self, argument: Any) -> Any:
        """Return what stands for an argument that is no tensor."""
        if not isinstance(argument, Node):
            return argument
        example = argument.meta["val"]
        if isinstance(example, int | float | bool):
            return example
        if isinstance(example, SymInt):
            return self.captures.read(argument, ())
        raise NotLiftableError(f"{argument.name} is a {type(example).__name__}")

    def _constant_tensor(self, node: Node) -> Element:
        constant = self.traced.constants[str(node.target)]
        if constant.dim() != 0:
            raise NotLiftableError("it is made from a constant tensor")
        return constant.item()

    # Indices

    def affine(self, index: Element, step: Any, start: Any) -> Any:
        """Return start + step * index, for steps and starts that are constants or traced sizes."""
        step, start = self._number(step), self._number(start)
        scaled = index if step == 1 else self.formula.emit(aten.mul.Tensor, [index, step], {}, torch.int64)
        return scaled if start == 0 else self.formula.emit(aten.add.Tensor, [scaled, start], {}, torch.int64)

    def merge(self, parts: Indices, sizes: tuple[Any, ...]) -> Element:
        """Return the index of a dimension that merges several, e.g. batch * H + head."""
        parts = tuple(
            0 if size is not None and statically_known_true(size == 1) else p
            for p, size in zip(parts, sizes, strict=True)
        )
        merged: Element = parts[0]
        for part, size in zip(parts[1:], sizes[1:], strict=True):
            scaled = self.formula.emit(aten.mul.Tensor, [merged, self._number(size)], {}, torch.int64)
            merged = self.formula.emit(aten.add.Tensor, [scaled, part], {}, torch.int64)
        if isinstance(merged, Node) and merged not in parts:
            self._merged[merged] = (parts, sizes)
        return merged

    def split(self, index: Element, sizes: tuple[Any, ...]) -> Indices:
        """Undo ``merge``."""
        if isinstance(index, Node) and index in self._merged:
            parts, merged_sizes = self._merged[index]
            if len(sizes) == len(parts) and all(
                statically_known_true(a == b) for a, b in zip(sizes[1:], merged_sizes[1:], strict=True)
            ):
                return parts
        if not all(isinstance(size, int) for size in sizes[1:]):
            raise NoRuleError
        parts = ()
        for size in reversed(sizes[1:]):
            parts = (self.formula.emit(aten.remainder.Scalar, [index, size], {}, torch.int64), *parts)
            index = self.formula.emit(aten.floor_divide.default, [index, size], {}, torch.int64)
        return index, *parts


def _is_elementwise(target: Any) -> bool:
    """Tell whether a traced operation computes each element from the same elements of its operands."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in target.tags or target.overloadpacket in (aten.floor_divide, aten.remainder)


def _out_of_place(target: Any) -> Any:
    """Return ``add`` for ``add_``: elements are values, and the matcher has seen that nobody else looks."""
    packet = target.overloadpacket
    name = packet.__name__
    return getattr(getattr(aten, name[:-1]), target._overloadname) if name.endswith("_") else target


Rule = Callable[[Lifter, Node, Indices], Element]


def add_rule(rules: dict[Any, Rule], *targets: Any) -> Callable[[Rule], Rule]:
    """Return a decorator that enters a function as the rule of some operations."""

    def register(rule: Rule) -> Rule:
        rules.update(dict.fromkeys(targets, rule))
        return rule

    return register
