"""Turn a tensor that a graph computes for every pair of query and key into a function of one pair.

    mask = (kv_index <= q_index) & pad[batch_index, kv_index]      (B, 1, S, S) bools: 16 GiB at 128k tokens

becomes

    mask_mod(batch, head, query, key, capture_1) = (key <= query) & capture_1[batch, key]

The walk starts at the last operation and follows an index into its operands: elementwise operations pass it on, views
rearrange it, arange and full answer it. What can't answer is captured, whole, if at most one of query and key indexes
it: that is O(S) numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import SymInt, Tensor
from torch.fx import Graph, Node

from flexprefill_compile.torch_internals import guard_or_false, statically_known_true

from ..graph.trace import TracedValue, ancestors_of

aten = torch.ops.aten
# An element of a tensor, or an index of a dimension: a node of the lifted graph, or a constant.
Element = Node | bool | int | float
Indices = tuple[Element, ...]


class NotLiftableError(Exception):
    """The tensor is no function of a pair's indices and of O(S) captures; the message says what stands in the way."""


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


INDEX_NAMES = ("batch", "head", "query", "key")


class Lifter:
    """Builds the graph of one element of a traced (B, H, Sq, Skv) tensor, or of one that broadcasts to it."""

    def __init__(self, traced: TracedValue, heads: int | None, largest_mask: int, rules: Mapping[Any, Rule]) -> None:
        """Prepare to lift.

        Args:
            traced: What computes the tensor.
            heads: H, if it depends on the products of queries and keys, which may merge batch and head.
            largest_mask: Most elements of a graph input that is captured although query and key both index it.
            rules: How an index goes through what isn't elementwise, by operation.
        """
        self.rules = rules
        self.traced = traced
        self.scores = traced.product
        self.heads = heads
        self.largest_mask = largest_mask
        self.graph = Graph()
        self.score = self.graph.placeholder("score")
        self.batch, self.head, self.query, self.key = (self.graph.placeholder(name) for name in INDEX_NAMES)
        self.captures: dict[Capture, Node] = {}
        self.choices: dict[Node, tuple[Node, Element, Element]] = {}
        self._merged: dict[Node, tuple[Indices, tuple[Any, ...]]] = {}
        self._memo: dict[tuple[Node, Indices], Element] = {}
        self._dependence: dict[Node, frozenset[Node]] = {
            self.query: frozenset({self.query}),
            self.key: frozenset({self.key}),
        }

    def lift(self) -> LiftedElement:
        """Lift the traced tensor.

        Raises:
            NotLiftableError: It can't be.
        """
        output = self.traced.output
        dims = len(output.meta["val"].shape)
        if dims == 3 and self.heads is not None:
            indices: Indices = (self.merge((self.batch, self.head), (None, self.heads)), self.query, self.key)
        elif dims <= 4:
            indices = (self.batch, self.head, self.query, self.key)[4 - dims :]
        else:
            raise NotLiftableError(f"it has {dims} dimensions")
        element = self.element(output, indices)
        return LiftedElement(self.graph, element, {new: old for old, new in self.captures.items()})

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
        if node is self.scores:
            return self._read_score(indices)
        rule = self.rules.get(node.target)
        if rule is not None:
            try:
                return rule(self, node, indices)
            except NoRuleError:
                pass
        elif is_elementwise(node.target):
            return self._lift_pointwise(node, indices)
        return self.capture(node, indices)

    def _read_score(self, indices: Indices) -> Element:
        *batch_and_head, query, key = indices
        (first,) = batch_and_head[:1]
        merged = self._merged.get(first) if isinstance(first, Node) else None
        parts = merged[0] if len(batch_and_head) == 1 and merged is not None else tuple(batch_and_head)
        expected = (self.batch, self.head, self.query, self.key)
        if len(parts) != 2 or any(
            part not in (index, 0) for part, index in zip((*parts, query, key), expected, strict=True)
        ):
            raise NotLiftableError("scores of several pairs enter one logit")
        return self.score

    # Elementwise operations

    def _lift_pointwise(self, node: Node, indices: Indices) -> Element:
        example: Tensor = node.meta["val"]
        inputs: Sequence[Any] = node.args
        tensors = [a for a in inputs if isinstance(a, Node) and isinstance(a.meta["val"], Tensor)]
        operands = {a: self.element(a, broadcast(indices, a.meta["val"], example)) for a in tensors}
        arguments = [operands[a] if a in operands else self._number(a) for a in inputs]
        keywords = {k: self._number(v) for k, v in node.kwargs.items() if k not in ("device", "layout", "pin_memory")}
        is_where = node.target is aten.where.self
        dtypes = {a.meta["val"].dtype for a in tensors[is_where:]}
        if len(dtypes) > 1:  # elements have no dimensions, so promotion would go another way than for the tensors
            common = _promote(tensors[is_where:])
            for position, a in enumerate(inputs):
                if a in tensors[is_where:]:
                    arguments[position] = self.cast(arguments[position], a.meta["val"].dtype, common)
        return self.emit(_out_of_place(node.target), arguments, keywords, example.dtype)

    def _number(self, argument: Any) -> Any:
        """Return what stands for an argument that is no tensor."""
        if not isinstance(argument, Node):
            return argument
        example = argument.meta["val"]
        if isinstance(example, int | float | bool):
            return example
        if isinstance(example, SymInt):
            return self.capture(argument, ())
        raise NotLiftableError(f"{argument.name} is a {type(example).__name__}")

    def _constant_tensor(self, node: Node) -> Element:
        constant = self.traced.constants[str(node.target)]
        if constant.dim() != 0:
            raise NotLiftableError("it is made from a constant tensor")
        return constant.item()

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
            return _compute(target, arguments, keywords, dtype)
        chosen = [a for a in arguments if isinstance(a, Node)]
        if len(chosen) == 1 and chosen[0] in self.choices and target is not aten.where.self:
            condition, *values = self.choices[chosen[0]]
            if_true, if_false = (
                _compute(target, [value if a is chosen[0] else a for a in arguments], keywords, dtype)
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
        self.choices[choice] = (condition, if_true, if_false)
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
                self._constant(a, _dtype_of(a))
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

    def affine(self, index: Element, step: Any, start: Any) -> Any:
        """Return start + step * index, for steps and starts that are constants or traced sizes."""
        step, start = self._number(step), self._number(start)
        scaled = index if step == 1 else self.emit(aten.mul.Tensor, [index, step], {}, torch.int64)
        return scaled if start == 0 else self.emit(aten.add.Tensor, [scaled, start], {}, torch.int64)

    def is_position(self, element: Element) -> bool:
        """Tell whether an element is known not to be negative."""
        return (isinstance(element, int) and element >= 0) or element in (self.batch, self.head, self.query, self.key)

    # Captures

    def capture(self, node: Node, indices: Indices) -> Element:
        """Read an element of a tensor that exists at run time, if it has O(S) elements or is the user's own."""
        pair = sum(bool(self._depends(index)) for index in indices) > 1
        if pair and (node.op != "placeholder" or node is self.scores):
            raise NotLiftableError(f"{_describe(node)} is computed for every query and key")
        if pair and not guard_or_false(node.meta["val"].numel() <= self.largest_mask):
            raise NotLiftableError(f"a mask of {node.meta['val'].numel()} elements, more than {self.largest_mask}")
        capture = Capture(node, tuple(index if isinstance(index, int) else None for index in indices))
        if capture not in self.captures:
            self._check_affordable(node)
            with self.graph.inserting_after(self.graph.find_nodes(op="placeholder")[-1]):
                self.captures[capture] = self.graph.placeholder(f"capture_{len(self.captures) + 1}")
        entries = [index for index in indices if isinstance(index, Node)]
        captured = self.captures[capture]
        return self._call(aten.index.Tensor, [captured, entries], {}) if entries else captured

    def _check_affordable(self, node: Node) -> None:
        """Refuse a capture whose own computation makes a tensor for every query and key."""
        scores = math.prod(self.traced.output.meta["val"].shape[-2:])  # numel() would pin the sizes
        waiting, seen = [node], set()
        while waiting:
            current = waiting.pop()
            if current in seen or current.op == "placeholder":
                continue
            seen.add(current)
            example = current.meta["val"]
            if current is self.scores or (
                isinstance(example, Tensor) and len(example.shape) > 1 and _is_at_least(example.numel(), scores)
            ):
                raise NotLiftableError(f"{_describe(node)} needs {_describe(current)}, which has the size of the mask")
            waiting.extend(current.all_input_nodes)

    # Indices

    def merge(self, parts: Indices, sizes: tuple[Any, ...]) -> Element:
        """Return the index of a dimension that merges several, e.g. batch * H + head."""
        parts = tuple(
            0 if size is not None and statically_known_true(size == 1) else p
            for p, size in zip(parts, sizes, strict=True)
        )
        merged: Element = parts[0]
        for part, size in zip(parts[1:], sizes[1:], strict=True):
            scaled = self.emit(aten.mul.Tensor, [merged, self._number(size)], {}, torch.int64)
            merged = self.emit(aten.add.Tensor, [scaled, part], {}, torch.int64)
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
            parts = (self.emit(aten.remainder.Scalar, [index, size], {}, torch.int64), *parts)
            index = self.emit(aten.floor_divide.default, [index, size], {}, torch.int64)
        return index, *parts


def is_elementwise(target: Any) -> bool:
    """Tell whether a traced operation computes each element from the same elements of its operands."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in target.tags or target.overloadpacket in (aten.floor_divide, aten.remainder)


def _out_of_place(target: Any) -> Any:
    """Return ``add`` for ``add_``: elements are values, and the matcher has seen that nobody else looks."""
    packet = target.overloadpacket
    name = packet.__name__
    return getattr(getattr(aten, name[:-1]), target._overloadname) if name.endswith("_") else target


class NoRuleError(Exception):
    """The rule of an operation doesn't cover these arguments; capture its result instead."""


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


def is_read_by_pair(element: Node) -> bool:
    """Tell whether a lifted element is read from a tensor at both the query and the key."""
    if element.target is not aten.index.Tensor:
        return False
    entries: Any = element.args[1]
    names = [{node.name for node in ancestors_of(entry)} for entry in entries]
    return sum(bool({"query", "key"} & entry) for entry in names) > 1


def is_negation(condition: Node) -> bool:
    """Tell whether a condition is ``not`` another one."""
    return condition.target in (aten.logical_not.default, aten.bitwise_not.default)


def _takes_tensor(target: Any, position: int) -> bool:
    if target in _TENSOR_FIRST:
        return position == 0
    return isinstance(target._schema.arguments[position].type, torch.TensorType)


def broadcast(indices: Indices, operand: Tensor, result: Tensor) -> Indices:
    """Return the indices of an operand's element from those of the result's: the last dimensions."""
    return indices[len(result.shape) - len(operand.shape) :]


def _promote(tensors: Sequence[Node]) -> torch.dtype:
    common: Tensor = tensors[0].meta["val"]
    dtype = common.dtype
    for node in tensors[1:]:
        dtype = torch.result_type(common, node.meta["val"])
        common = torch.empty((1,) * max(common.dim(), node.meta["val"].dim()), dtype=dtype, device="meta")
    return dtype


def _dtype_of(value: Element) -> torch.dtype:
    return torch.bool if isinstance(value, bool) else torch.int64 if isinstance(value, int) else torch.float32


def _compute(target: Any, arguments: Sequence[Any], keywords: dict[str, Any], dtype: torch.dtype) -> Element:
    """Run an operation on constants."""
    tensors = [torch.tensor(a) if isinstance(a, bool | int | float) and i == 0 else a for i, a in enumerate(arguments)]
    if target is aten._to_copy.default:
        return cast("Element", tensors[0].to(dtype).item())
    try:
        result = target(*tensors, **keywords)
    except RuntimeError:
        result = target(*map(torch.tensor, arguments), **keywords)
    return cast("Element", result.to(dtype).item())


def _is_at_least(size: Any, bound: Any) -> bool:
    """Compare sizes, symbolic ones by the values they were seen with: a decision about cost that needs no guard."""
    hint = getattr(getattr(size, "node", None), "hint", size)
    bound_hint = getattr(getattr(bound, "node", None), "hint", bound)
    return hint is not None and bound_hint is not None and hint >= bound_hint > 1


def _describe(node: Node) -> str:
    return f"the result of {getattr(node.target, '__name__', node.target)}"


Rule = Callable[[Lifter, Node, Indices], Element]
