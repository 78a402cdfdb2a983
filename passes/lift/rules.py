"""How an index goes through what isn't elementwise: views, ranges, constants, triangles, lookups.

Each rule gets the indices of an element of a node's result and returns the element.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from flexprefill_compile.torch_internals import statically_known_true

from .mask import Element, Indices, Lifter, NoRuleError, Rule, broadcast

aten = torch.ops.aten


RULES: dict[Any, Rule] = {}


def _arguments(node: Node) -> Any:
    return node.args


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, rule))
        return rule

    return register


@_rule(
    aten.alias.default, aten.detach.default, aten.clone.default, aten.lift_fresh_copy.default, aten.contiguous.default
)
def _lift_same(lifter: Lifter, node: Node, indices: Indices) -> Element:
    return lifter.element(_arguments(node)[0], indices)


@_rule(aten._to_copy.default)
def _lift_cast(lifter: Lifter, node: Node, indices: Indices) -> Element:
    (source,) = _arguments(node)
    element = lifter.element(source, indices)
    return lifter.cast(element, source.meta["val"].dtype, node.meta["val"].dtype)


@_rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _lift_masked_fill(lifter: Lifter, node: Node, indices: Indices) -> Element:
    source, mask, value = _arguments(node)
    example = node.meta["val"]
    kept = lifter.element(source, broadcast(indices, source.meta["val"], example))
    filled = lifter.element(mask, broadcast(indices, mask.meta["val"], example))
    fill = lifter.element(value, ())
    return lifter.emit(aten.where.self, [filled, fill, kept], {}, example.dtype)


@_rule(aten.unsqueeze.default)
def _lift_unsqueeze(lifter: Lifter, node: Node, indices: Indices) -> Element:
    source, dim = _arguments(node)
    dim = dim % len(indices)
    return lifter.element(source, indices[:dim] + indices[dim + 1 :])


@_rule(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.view.default, aten.reshape.default)
@_rule(aten._unsafe_view.default, aten.unflatten.int, aten.flatten.using_ints)
def _lift_view(lifter: Lifter, node: Node, indices: Indices) -> Element:
    source: Node = _arguments(node)[0]
    return lifter.element(source, _reshape_indices(lifter, indices, node.meta["val"].shape, source.meta["val"].shape))


def _reshape_indices(lifter: Lifter, indices: Indices, shape: Sequence[Any], source: Sequence[Any]) -> Indices:
    """Follow an index through a view, in which a run of dimensions becomes one or the other way round."""
    outer = [(index, size) for index, size in zip(indices, shape, strict=True) if not statically_known_true(size == 1)]
    inner = [(dim, size) for dim, size in enumerate(source) if not statically_known_true(size == 1)]
    result: list[Element] = [0] * len(source)
    while outer and inner:
        num_outer, num_inner = _find_runs([size for _, size in outer], [size for _, size in inner])
        run, outer = outer[:num_outer], outer[num_outer:]
        targets, inner = inner[:num_inner], inner[num_inner:]
        merged = run[0][0] if num_outer == 1 else lifter.merge(tuple(i for i, _ in run), tuple(s for _, s in run))
        parts = (merged,) if num_inner == 1 else lifter.split(merged, tuple(size for _, size in targets))
        for (dim, _), part in zip(targets, parts, strict=True):
            result[dim] = part
    if outer or inner:
        raise NoRuleError
    return tuple(result)


def _find_runs(outer: list[Any], inner: list[Any]) -> tuple[int, int]:
    """Return how many leading sizes on each side have one product; one of the numbers is 1."""
    for length in range(1, max(len(outer), len(inner)) + 1):
        if statically_known_true(math.prod(outer[:length]) == inner[0]):
            return length, 1
        if statically_known_true(outer[0] == math.prod(inner[:length])):
            return 1, length
    raise NoRuleError


@_rule(aten.expand.default)
def _lift_expand(lifter: Lifter, node: Node, indices: Indices) -> Element:
    source: Node = _arguments(node)[0]
    return lifter.element(source, broadcast(indices, source.meta["val"], node.meta["val"]))


@_rule(aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default)
def _lift_permute(lifter: Lifter, node: Node, indices: Indices) -> Element:
    dims = len(indices)
    order = list(range(dims))
    if node.target is aten.permute.default:
        order = [dim % dims for dim in _arguments(node)[1]]
    elif dims > 1:
        first, second = _arguments(node)[1:] if node.target is aten.transpose.int else (0, 1)
        order[first], order[second] = order[second], order[first]
    result: list[Element] = [0] * dims
    for index, dim in zip(indices, order, strict=True):
        result[dim] = index
    return lifter.element(_arguments(node)[0], tuple(result))


@_rule(aten.select.int)
def _lift_select(lifter: Lifter, node: Node, indices: Indices) -> Element:
    source, dim, position = _arguments(node)
    dims, size = len(indices) + 1, source.meta["val"].shape[dim]
    dim = dim % dims
    if isinstance(position, int) and position < 0 and isinstance(size, int):
        position += size
    if not isinstance(position, int) or position < 0:
        raise NoRuleError
    return lifter.element(source, (*indices[:dim], position, *indices[dim:]))


@_rule(aten.slice.Tensor)
def _lift_slice(lifter: Lifter, node: Node, indices: Indices) -> Element:
    given = list(_arguments(node))
    source, dim, start, _, step = given + [None, 0, 0, None, 1][len(given) :]
    dim = dim % len(indices)
    shape = source.meta["val"].shape
    if isinstance(start, int) and start < 0:
        start = start + shape[dim] if isinstance(shape[dim], int) else None
    if start is None or statically_known_true(shape[dim] == node.meta["val"].shape[dim]):
        start = 0 if start is None or (isinstance(start, int) and start >= 0) else start
    if isinstance(start, Node) and not statically_known_true(start.meta["val"] >= 0):
        raise NoRuleError
    if isinstance(start, int) and start < 0:
        raise NoRuleError
    index = lifter.affine(indices[dim], step, start)
    return lifter.element(source, (*indices[:dim], index, *indices[dim + 1 :]))


@_rule(aten.flip.default)
def _lift_flip(lifter: Lifter, node: Node, indices: Indices) -> Element:
    source, dims = _arguments(node)
    result = list(indices)
    for dim in dims:
        size = source.meta["val"].shape[dim]
        if not isinstance(size, int):
            raise NoRuleError
        result[dim] = lifter.affine(indices[dim], -1, size - 1)
    return lifter.element(source, tuple(result))


@_rule(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _lift_arange(lifter: Lifter, node: Node, indices: Indices) -> Element:
    start, step = 0, 1
    if node.target is not aten.arange.default:
        start, step = (*_arguments(node), 1)[0], (*_arguments(node), 1, 1)[2]
    if not all(isinstance(x, int | Node) for x in (start, step)):
        raise NoRuleError
    position = lifter.affine(indices[0], step, start)
    return lifter.cast(position, torch.int64, node.meta["val"].dtype)


@_rule(aten.full.default, aten.new_full.default, aten.full_like.default)
def _lift_full(lifter: Lifter, node: Node, indices: Indices) -> Element:
    value = _arguments(node)[1 if node.target is not aten.new_full.default else 2]
    return lifter.element(value, ())


@_rule(aten.scalar_tensor.default)
def _lift_scalar(lifter: Lifter, node: Node, indices: Indices) -> Element:
    return lifter.element(_arguments(node)[0], ())


@_rule(aten.ones.default, aten.new_ones.default, aten.ones_like.default)
def _lift_ones(lifter: Lifter, node: Node, indices: Indices) -> Element:
    return True if node.meta["val"].dtype == torch.bool else 1


@_rule(aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
def _lift_zeros(lifter: Lifter, node: Node, indices: Indices) -> Element:
    return False if node.meta["val"].dtype == torch.bool else 0


@_rule(aten.tril.default, aten.triu.default)
def _lift_triangle(lifter: Lifter, node: Node, indices: Indices) -> Element:
    source, diagonal = (*_arguments(node), 0)[:2]
    *_, row, column = indices
    limit = lifter.affine(row, 1, diagonal)
    compare = aten.le.Tensor if node.target is aten.tril.default else aten.ge.Tensor
    inside = lifter.emit(compare, [column, limit], {}, torch.bool)
    dtype = node.meta["val"].dtype
    zero = False if dtype == torch.bool else 0
    return lifter.select(inside, lifter.element(source, indices), zero, dtype)


@_rule(aten.cat.default)
def _lift_cat(lifter: Lifter, node: Node, indices: Indices) -> Element:
    sources, dim = (*_arguments(node), 0)[:2]
    dim = dim % len(indices)
    sizes = [source.meta["val"].shape[dim] for source in sources]
    if not all(isinstance(size, int) for size in sizes):
        raise NoRuleError
    dtype = node.meta["val"].dtype
    starts = list(itertools.accumulate(sizes, initial=0))[:-1]
    result: Element = False
    for number, (source, start, size) in enumerate(zip(sources, starts, sizes, strict=True)):
        # The part that isn't read is still computed, at an index that exists.
        shifted = lifter.affine(indices[dim], 1, -start)
        clamped = lifter.emit(aten.clamp.default, [shifted, 0, size - 1], {}, torch.int64)
        part = lifter.element(source, (*indices[:dim], clamped, *indices[dim + 1 :]))
        part = lifter.cast(part, source.meta["val"].dtype, dtype)
        inside = lifter.emit(aten.ge.Tensor, [indices[dim], start], {}, torch.bool)
        result = part if number == 0 else lifter.select(inside, part, result, dtype)
    return result


@_rule(aten.index.Tensor)
def _lift_index(lifter: Lifter, node: Node, indices: Indices) -> Element:
    source, entries = _arguments(node)
    given = [position for position, entry in enumerate(entries) if entry is not None]
    if given != list(range(given[0], given[-1] + 1)) or any(entries[p].meta["val"].dtype == torch.bool for p in given):
        raise NoRuleError
    tensors = [entries[p] for p in given]
    num_broadcast = max(len(t.meta["val"].shape) for t in tensors)
    first = given[0]
    shared = indices[first : first + num_broadcast]
    looked_up = [lifter.element(t, shared[num_broadcast - len(t.meta["val"].shape) :]) for t in tensors]
    source_indices = (*indices[:first], *looked_up, *indices[first + num_broadcast :])
    # A negative entry counts from the end, which only a real tensor answers.
    if not all(lifter.is_position(entry) for entry in looked_up):
        return lifter.capture(source, source_indices)
    return lifter.element(source, source_indices)
