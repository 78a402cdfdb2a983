"""What an element is where operations make, choose or join values: ranges, constants, casts, triangles, lookups.

Each rule gets the indices of an element of a node's result and returns the element.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch.fx import Node

from .elements import Element, Indices, NoRuleError, broadcast
from .lifter import Lifter, Rule, add_rule

aten = torch.ops.aten

VALUE_RULES: dict[Any, Rule] = {}
_rule = functools.partial(add_rule, VALUE_RULES)


def _arguments(node: Node) -> Any:
    """Return the arguments as they stand, of whatever types the operation's schema says."""
    return node.args


@_rule(aten._to_copy.default)
def _lift_cast(lifter: Lifter, node: Node, indices: Indices) -> Element:
    (source,) = _arguments(node)
    element = lifter.element(source, indices)
    return lifter.formula.cast(element, source.meta["val"].dtype, node.meta["val"].dtype)


@_rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _lift_masked_fill(lifter: Lifter, node: Node, indices: Indices) -> Element:
    source, mask, value = _arguments(node)
    example = node.meta["val"]
    kept = lifter.element(source, broadcast(indices, source.meta["val"], example))
    filled = lifter.element(mask, broadcast(indices, mask.meta["val"], example))
    fill = lifter.element(value, ())
    return lifter.formula.emit(aten.where.self, [filled, fill, kept], {}, example.dtype)


@_rule(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _lift_arange(lifter: Lifter, node: Node, indices: Indices) -> Element:
    start, step = 0, 1
    if node.target is not aten.arange.default:
        start, step = (*_arguments(node), 1)[0], (*_arguments(node), 1, 1)[2]
    if not all(isinstance(x, int | Node) for x in (start, step)):
        raise NoRuleError
    position = lifter.affine(indices[0], step, start)
    return lifter.formula.cast(position, torch.int64, node.meta["val"].dtype)


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
    inside = lifter.formula.emit(compare, [column, limit], {}, torch.bool)
    dtype = node.meta["val"].dtype
    zero = False if dtype == torch.bool else 0
    return lifter.formula.select(inside, lifter.element(source, indices), zero, dtype)


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
        clamped = lifter.formula.emit(aten.clamp.default, [shifted, 0, size - 1], {}, torch.int64)
        part = lifter.element(source, (*indices[:dim], clamped, *indices[dim + 1 :]))
        part = lifter.formula.cast(part, source.meta["val"].dtype, dtype)
        inside = lifter.formula.emit(aten.ge.Tensor, [indices[dim], start], {}, torch.bool)
        result = part if number == 0 else lifter.formula.select(inside, part, result, dtype)
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
    if not all(lifter.formula.is_position(entry) for entry in looked_up):
        return lifter.captures.read(source, source_indices)
    return lifter.element(source, source_indices)
