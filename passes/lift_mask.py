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
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Graph, GraphModule, Node

from flexprefill_compile.passes.trace import TracedValue
from flexprefill_compile.torch_internals import guard_or_false, statically_known_true

aten = torch.ops.aten
# An index of a dimension: a node of the lifted graph, or a constant.
Index = Node | int
Indices = tuple[Index, ...]
# A lifted element: a node of the lifted graph, or a constant.
Element = Node | bool | int | float


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

    def __init__(self, traced: TracedValue, heads: int | None, largest_mask: int) -> None:
        """Prepare to lift.

        Args:
            traced: What computes the tensor.
            heads: H, if it depends on the products of queries and keys, which may merge batch and head.
            largest_mask: Most elements of a graph input that is captured although query and key both index it.
        """
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
        self._dependence: dict[Node, frozenset[Node]] = {self.query: frozenset({self.query}), self.key: frozenset({self.key})}

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
            return node  # type: ignore[no-any-return]
        if node.op == "get_attr":
            return self._constant_tensor(node)
        example = node.meta["val"]
        if not isinstance(example, Tensor):
            return self._number(node)  # type: ignore[no-any-return]
        indices = tuple(
            0 if statically_known_true(size == 1) else index for index, size in zip(indices, example.shape, strict=True)
        )
        if (node, indices) not in self._memo:
            self._memo[node, indices] = self._lift_node(node, indices)
        return self._memo[node, indices]

    def _lift_node(self, node: Node, indices: Indices) -> Element:
        if node is self.scores:
            return self._read_score(indices)
        rule = RULES.get(node.target)  # type: ignore[arg-type]
        if rule is not None:
            try:
                return rule(self, node, indices)
            except _NoRuleError:
                pass
        elif is_elementwise(node.target):
            return self._lift_pointwise(node, indices)
        return self.capture(node, indices)

    def _read_score(self, indices: Indices) -> Element:
        *batch_and_head, query, key = indices
        (first,) = batch_and_head[:1]
        merged = self._merged.get(first) if isinstance(first, Node) else None  # type: ignore[arg-type]
        parts = merged[0] if len(batch_and_head) == 1 and merged is not None else tuple(batch_and_head)
        expected = (self.batch, self.head, self.query, self.key)
        if len(parts) != 2 or any(part not in (index, 0) for part, index in zip((*parts, query, key), expected, strict=True)):
            raise NotLiftableError("scores of several pairs enter one logit")
        return self.score

    # Elementwise operations

    def _lift_pointwise(self, node: Node, indices: Indices) -> Element:
        example: Tensor = node.meta["val"]
        tensors = [a for a in node.args if isinstance(a, Node) and isinstance(a.meta["val"], Tensor)]
        operands = {a: self.element(a, _broadcast(indices, a.meta["val"], example)) for a in tensors}
        arguments = [operands[a] if a in operands else self._number(a) for a in node.args]  # type: ignore[index]
        keywords = {k: self._number(v) for k, v in node.kwargs.items() if k not in ("device", "layout", "pin_memory")}
        is_where = node.target is aten.where.self
        dtypes = {a.meta["val"].dtype for a in tensors[is_where:]}
        if len(dtypes) > 1:  # elements have no dimensions, so promotion would go another way than for the tensors
            common = _promote(tensors[is_where:])
            for position, a in enumerate(node.args):
                if a in tensors[is_where:]:
                    arguments[position] = self.cast(arguments[position], a.meta["val"].dtype, common)  # type: ignore[union-attr]
        return self.emit(_out_of_place(node.target), arguments, keywords, example.dtype)

    def _number(self, argument: Any) -> Any:
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
        return self.emit(aten._to_copy.default, [element], {"dtype": target}, target)

    def emit(self, target: Any, arguments: Sequence[Any], keywords: dict[str, Any], dtype: torch.dtype) -> Element:
        """Add an elementwise operation on elements, simplified where constants decide it."""
        simplified = self._simplify(target, arguments)
        if simplified is not None:
            return simplified
        if target is aten.where.self and not isinstance(arguments[1], Node) and not isinstance(arguments[2], Node):
            return self._choose(arguments[0], arguments[1], arguments[2], dtype)
        if not any(isinstance(a, Node) for a in arguments):
            return _compute(target, arguments, keywords, dtype)
        chosen = [a for a in arguments if isinstance(a, Node)]
        if len(chosen) == 1 and chosen[0] in self.choices and target is not aten.where.self:
            condition, *values = self.choices[chosen[0]]
            outcomes = [
                _compute(target, [value if a is chosen[0] else a for a in arguments], keywords, dtype)
                for value in values
            ]
            return self._choose(condition, *outcomes, dtype)
        return self._call(target, arguments, keywords)

    def _simplify(self, target: Any, arguments: Sequence[Any]) -> Element | None:
        packet = getattr(target, "overloadpacket", None)
        first, second = (*arguments, None, None)[:2]
        if packet in (aten.bitwise_and, aten.logical_and, aten.bitwise_or, aten.logical_or):
            neutral = packet in (aten.bitwise_and, aten.logical_and)
            for constant, other in ((first, second), (second, first)):
                if isinstance(constant, bool):
                    return other if constant is neutral else constant  # type: ignore[return-value]
        if packet in (aten.add, aten.sub) and isinstance(second, int) and second == 0 and isinstance(first, Node):
            return first
        if target is aten.where.self and isinstance(first, bool):
            return arguments[1] if first else arguments[2]  # type: ignore[no-any-return]
        if packet in (aten.bitwise_not, aten.logical_not) and isinstance(first, Node):
            return self._negate(first) if packet is aten.logical_not or is_negation(first) else None
        return None

    def _negate(self, condition: Node) -> Node:
        if is_negation(condition):
            return condition.args[0]  # type: ignore[return-value]
        return self._call(aten.logical_not.default, [condition], {})

    def _choose(self, condition: Node, if_true: Element, if_false: Element, dtype: torch.dtype) -> Element:
        """Return what takes one of two constants; a condition itself, where they are booleans."""
        if if_true == if_false:
            return if_true
        if dtype == torch.bool:
            return condition if if_true else self._negate(condition)
        choice = self._call(aten.where.self, [condition, self._constant(if_true, dtype), self._constant(if_false, dtype)], {})
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
        scores = self.traced.output.meta["val"].shape[-2:].numel()
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

    def merge(self, parts: Indices, sizes: tuple[Any, ...]) -> Index:
        """Return the index of a dimension that merges several, e.g. batch * H + head."""
        parts = tuple(0 if size is not None and statically_known_true(size == 1) else p for p, size in zip(parts, sizes, strict=True))
        merged: Index = parts[0]
        for part, size in zip(parts[1:], sizes[1:], strict=True):
            scaled = self.emit(aten.mul.Tensor, [merged, self._number(size)], {}, torch.int64)
            merged = self.emit(aten.add.Tensor, [scaled, part], {}, torch.int64)  # type: ignore[assignment]
        if isinstance(merged, Node) and merged not in parts:
            self._merged[merged] = (parts, sizes)
        return merged

    def split(self, index: Index, sizes: tuple[Any, ...]) -> Indices:
        """Undo ``_merge``."""
        if isinstance(index, Node) and index in self._merged:
            parts, merged_sizes = self._merged[index]
            if len(sizes) == len(parts) and all(
                statically_known_true(a == b) for a, b in zip(sizes[1:], merged_sizes[1:], strict=True)
            ):
                return parts
        if not all(isinstance(size, int) for size in sizes[1:]):
            raise _NoRuleError
        parts = ()
        for size in reversed(sizes[1:]):
            parts = (self.emit(aten.remainder.Scalar, [index, size], {}, torch.int64), *parts)  # type: ignore[assignment]
            index = self.emit(aten.floor_divide.default, [index, size], {}, torch.int64)  # type: ignore[assignment]
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


class _NoRuleError(Exception):
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
_TENSOR_FIRST = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.bitwise_and.Tensor, aten.bitwise_or.Tensor})


def is_negation(condition: Node) -> bool:
    """Tell whether a condition is ``not`` another one."""
    return condition.target in (aten.logical_not.default, aten.bitwise_not.default)


def _takes_tensor(target: Any, position: int) -> bool:
    if target in _TENSOR_FIRST:
        return position == 0
    return isinstance(target._schema.arguments[position].type, torch.TensorType)


def _broadcast(indices: Indices, operand: Tensor, result: Tensor) -> Indices:
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
        return tensors[0].to(dtype).item()  # type: ignore[no-any-return]
    try:
        result = target(*tensors, **keywords)
    except RuntimeError:
        result = target(*map(torch.tensor, arguments), **keywords)
    return result.to(dtype).item()  # type: ignore[no-any-return]


def _is_at_least(size: Any, bound: Any) -> bool:
    """Compare sizes, symbolic ones by the values they were seen with: a decision about cost that needs no guard."""
    hint = getattr(getattr(size, "node", None), "hint", size)
    bound_hint = getattr(getattr(bound, "node", None), "hint", bound)
    return hint is not None and bound_hint is not None and hint >= bound_hint > 1


def _describe(node: Node) -> str:
    return f"the result of {getattr(node.target, '__name__', node.target)}"


# Rules for what isn't elementwise: (lifter, node, indices) -> element

Rule = Callable[[Lifter, Node, Indices], Element]
RULES: dict[Any, Rule] = {}


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, rule))
        return rule

    return register


@_rule(aten.alias.default, aten.detach.default, aten.clone.default, aten.lift_fresh_copy.default, aten.contiguous.default)
def _lift_same(lifter: Lifter, node: Node, indices: Indices) -> Element:
    return lifter.element(node.args[0], indices)


@_rule(aten._to_copy.default)
def _lift_cast(lifter: Lifter, node: Node, indices: Indices) -> Element:
    (source,) = node.args
    element = lifter.element(source, indices)
    return lifter.cast(element, source.meta["val"].dtype, node.meta["val"].dtype)  # type: ignore[union-attr]


@_rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _lift_masked_fill(lifter: Lifter, node: Node, indices: Indices) -> Element:
    source, mask, value = node.args
    example = node.meta["val"]
    kept = lifter.element(source, _broadcast(indices, source.meta["val"], example))  # type: ignore[union-attr]
    filled = lifter.element(mask, _broadcast(indices, mask.meta["val"], example))  # type: ignore[union-attr]
    fill = lifter.element(value, ())
    return lifter.emit(aten.where.self, [filled, fill, kept], {}, example.dtype)


@_rule(aten.unsqueeze.default)
def _lift_unsqueeze(lifter: Lifter, node: Node, indices: Indices) -> Element:
    source, dim = node.args
    dim = dim % len(indices)  # type: ignore[operator]
    return lifter.element(source, indices[:dim] + indices[dim + 1 :])


@_rule(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.view.default, aten.reshape.default)
@_rule(aten._unsafe_view.default, aten.unflatten.int, aten.flatten.using_ints)
def _lift_view(lifter: Lifter, node: Node, indices: Indices) -> Element:
    source: Node = node.args[0]  # type: ignore[assignment]
    return lifter.element(source, _reshape_indices(lifter, indices, node.meta["val"].shape, source.meta["val"].shape))


def _reshape_indices(lifter: Lifter, indices: Indices, shape: Sequence[Any], source: Sequence[Any]) -> Indices:
    """Follow an index through a view, in which a run of dimensions becomes one or the other way round."""
    outer = [(index, size) for index, size in zip(indices, shape, strict=True) if not statically_known_true(size == 1)]
    inner = [(dim, size) for dim, size in enumerate(source) if not statically_known_true(size == 1)]
    result: list[Index] = [0] * len(source)
    while outer and inner:
        num_outer, num_inner = _find_runs([size for _, size in outer], [size for _, size in inner])
        run, outer = outer[:num_outer], outer[num_outer:]
        targets, inner = inner[:num_inner], inner[num_inner:]
        merged = run[0][0] if num_outer == 1 else lifter.merge(tuple(i for i, _ in run), tuple(s for _, s in run))
        parts = (merged,) if num_inner == 1 else lifter.split(merged, tuple(size for _, size in targets))
        for (dim, _), part in zip(targets, parts, strict=True):
            result[dim] = part
    if outer or inner:
        raise _NoRuleError
    return tuple(result)


def _find_runs(outer: list[Any], inner: list[Any]) -> tuple[int, int]:
    """Return how many leading sizes on each side have one product; one of the numbers is 1."""
    for length in range(1, max(len(outer), len(inner)) + 1):
        if statically_known_true(math.prod(outer[:length]) == inner[0]):
            return length, 1
        if statically_known_true(outer[0] == math.prod(inner[:length])):
            return 1, length
    raise _NoRuleError


@_rule(aten.expand.default)
def _lift_expand(lifter: Lifter, node: Node, indices: Indices) -> Element:
    source: Node = node.args[0]  # type: ignore[assignment]
    return lifter.element(source, _broadcast(indices, source.meta["val"], node.meta["val"]))


@_rule(aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default)
def _lift_permute(lifter: Lifter, node: Node, indices: Indices) -> Element:
    dims = len(indices)
    order = list(range(dims))
    if node.target is aten.permute.default:
        order = [dim % dims for dim in node.args[1]]  # type: ignore[union-attr, operator]
    elif dims > 1:
        first, second = node.args[1:] if node.target is aten.transpose.int else (0, 1)
        order[first], order[second] = order[second], order[first]  # type: ignore[index]
    result: list[Index] = [0] * dims
    for index, dim in zip(indices, order, strict=True):
        result[dim] = index
    return lifter.element(node.args[0], tuple(result))


@_rule(aten.select.int)
def _lift_select(lifter: Lifter, node: Node, indices: Indices) -> Element:
    source, dim, position = node.args
    dims, size = len(indices) + 1, source.meta["val"].shape[dim]  # type: ignore[union-attr, index]
    dim = dim % dims  # type: ignore[operator]
    if isinstance(position, int) and position < 0 and isinstance(size, int):
        position += size
    if not isinstance(position, int) or position < 0:
        raise _NoRuleError
    return lifter.element(source, (*indices[:dim], position, *indices[dim:]))


@_rule(aten.slice.Tensor)
def _lift_slice(lifter: Lifter, node: Node, indices: Indices) -> Element:
    source, dim, start, _, step = (*node.args, *(0, 0, None, 1)[len(node.args) - 1 :])
    dim = dim % len(indices)
    shape = source.meta["val"].shape
    if isinstance(start, int) and start < 0:
        start = start + shape[dim] if isinstance(shape[dim], int) else None
    if start is None or statically_known_true(shape[dim] == node.meta["val"].shape[dim]):
        start = 0 if start is None or isinstance(start, int) and start >= 0 else start
    if isinstance(start, Node) and not statically_known_true(start.meta["val"] >= 0):
        raise _NoRuleError
    if isinstance(start, int) and start < 0:
        raise _NoRuleError
    index = lifter.affine(indices[dim], step, start)
    return lifter.element(source, (*indices[:dim], index, *indices[dim + 1 :]))


@_rule(aten.flip.default)
def _lift_flip(lifter: Lifter, node: Node, indices: Indices) -> Element:
    source, dims = node.args
    result = list(indices)
    for dim in dims:  # type: ignore[union-attr]
        size = source.meta["val"].shape[dim]  # type: ignore[union-attr, index]
        if not isinstance(size, int):
            raise _NoRuleError
        result[dim] = lifter.affine(indices[dim], -1, size - 1)  # type: ignore[index]
    return lifter.element(source, tuple(result))


@_rule(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _lift_arange(lifter: Lifter, node: Node, indices: Indices) -> Element:
    start, step = 0, 1
    if node.target is not aten.arange.default:
        start, step = (*node.args, 1)[0], (*node.args, 1, 1)[2]  # type: ignore[assignment]
    if not all(isinstance(x, int | Node) for x in (start, step)):
        raise _NoRuleError
    position = lifter.affine(indices[0], step, start)
    return lifter.cast(position, torch.int64, node.meta["val"].dtype)


@_rule(aten.full.default, aten.new_full.default, aten.full_like.default)
def _lift_full(lifter: Lifter, node: Node, indices: Indices) -> Element:
    value = node.args[1 if node.target is not aten.new_full.default else 2]
    return lifter.element(value, ())


@_rule(aten.scalar_tensor.default)
def _lift_scalar(lifter: Lifter, node: Node, indices: Indices) -> Element:
    return lifter.element(node.args[0], ())


@_rule(aten.ones.default, aten.new_ones.default, aten.ones_like.default)
def _lift_ones(lifter: Lifter, node: Node, indices: Indices) -> Element:
    return True if node.meta["val"].dtype == torch.bool else 1


@_rule(aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
def _lift_zeros(lifter: Lifter, node: Node, indices: Indices) -> Element:
    return False if node.meta["val"].dtype == torch.bool else 0


@_rule(aten.tril.default, aten.triu.default)
def _lift_triangle(lifter: Lifter, node: Node, indices: Indices) -> Element:
    source, diagonal = (*node.args, 0)[:2]
    *_, row, column = indices
    limit = lifter.affine(row, 1, diagonal)
    compare = aten.le.Tensor if node.target is aten.tril.default else aten.ge.Tensor
    inside = lifter.emit(compare, [column, limit], {}, torch.bool)
    dtype = node.meta["val"].dtype
    zero = False if dtype == torch.bool else 0
    return lifter.select(inside, lifter.element(source, indices), zero, dtype)


@_rule(aten.cat.default)
def _lift_cat(lifter: Lifter, node: Node, indices: Indices) -> Element:
    sources, dim = (*node.args, 0)[:2]
    dim = dim % len(indices)  # type: ignore[operator]
    sizes = [source.meta["val"].shape[dim] for source in sources]  # type: ignore[union-attr]
    if not all(isinstance(size, int) for size in sizes):
        raise _NoRuleError
    dtype = node.meta["val"].dtype
    starts = list(itertools.accumulate(sizes, initial=0))[:-1]
    result: Element = False
    for number, (source, start, size) in enumerate(zip(sources, starts, sizes, strict=True)):  # type: ignore[arg-type]
        # The part that isn't read is still computed, at an index that exists.
        shifted = lifter.affine(indices[dim], 1, -start)
        clamped = lifter.emit(aten.clamp.default, [shifted, 0, size - 1], {}, torch.int64)
        part = lifter.element(source, (*indices[:dim], clamped, *indices[dim + 1 :]))  # type: ignore[arg-type]
        part = lifter.cast(part, source.meta["val"].dtype, dtype)  # type: ignore[union-attr]
        inside = lifter.emit(aten.ge.Tensor, [indices[dim], start], {}, torch.bool)
        result = part if number == 0 else lifter.select(inside, part, result, dtype)
    return result


@_rule(aten.index.Tensor)
def _lift_index(lifter: Lifter, node: Node, indices: Indices) -> Element:
    source, entries = node.args
    given = [position for position, entry in enumerate(entries) if entry is not None]  # type: ignore[arg-type]
    if given != list(range(given[0], given[-1] + 1)) or any(
        entries[p].meta["val"].dtype == torch.bool for p in given  # type: ignore[index, union-attr]
    ):
        raise _NoRuleError
    tensors = [entries[p] for p in given]  # type: ignore[index]
    num_broadcast = max(len(t.meta["val"].shape) for t in tensors)  # type: ignore[union-attr]
    first = given[0]
    shared = indices[first : first + num_broadcast]
    looked_up = [
        lifter.element(t, shared[num_broadcast - len(t.meta["val"].shape) :]) for t in tensors  # type: ignore[union-attr]
    ]
    source_indices = (*indices[:first], *looked_up, *indices[first + num_broadcast :])
    # A negative entry counts from the end, which only a real tensor answers.
    if not all(lifter.is_position(entry) for entry in looked_up):
        return lifter.capture(source, source_indices)  # type: ignore[arg-type]
    return lifter.element(source, source_indices)  # type: ignore[arg-type]
