"""What an element is where operations make, choose or join values: ranges, constants, casts, triangles, lookups.

Each rule gets the indices of an element of a node's result and returns the element.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch.fx import Node

from .elements import POSITION_DTYPES, Element, Indices, NoRuleError, broadcast
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
    dtype, target = source.meta["val"].dtype, node.meta["val"].dtype
    if lifter.formula.is_narrowed(element, dtype, target) and not lifter.formula.depends_on_pair(indices):
        raise NoRuleError(
            "it converts numbers to a low precision"
        )  # captured, the numbers are what the model rounds them to
    return lifter.formula.cast(element, dtype, target)


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
    is_exact = node.meta["val"].dtype in POSITION_DTYPES
    if not is_exact or not all(isinstance(x, int | Node) for x in (start, step)):
        raise NoRuleError("it rearranges elements in a way that has no rule")
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
    dtype = node.meta["val"].dtype
    index, result = indices[dim], cast("Element", False)
    for number, source in enumerate(sources):
        # The part that isn't read is still computed: where it reads memory, at an index that exists.
        held = lifter.formula.hold_back(index)
        part = lifter.element(source, (*indices[:dim], held, *indices[dim + 1 :]))
        part = lifter.formula.cast(part, source.meta["val"].dtype, dtype)
        inside = lifter.formula.emit(aten.ge.Tensor, [index, 0], {}, torch.bool)
        result = part if number == 0 else lifter.formula.select(inside, part, result, dtype)
        index = lifter.subtract(index, lifter.size(source.meta["val"].shape[dim]))
    return result


@_rule(aten.constant_pad_nd.default)
def _lift_pad(lifter: Lifter, node: Node, indices: Indices) -> Element:
    source, amounts, value = (*_arguments(node), 0)[:3]
    inside: Element = True
    inner = list(indices)
    for number in range(len(amounts) // 2):  # before and after each dimension, the last one first
        dim, size = len(indices) - 1 - number, source.meta["val"].shape[-1 - number]
        before, after = (lifter.number(amount) for amount in amounts[2 * number : 2 * number + 2])
        index = lifter.subtract(indices[dim], before)
        conditions = [lifter.formula.emit(aten.ge.Tensor, [index, 0], {}, torch.bool)] if before != 0 else []
        if after != 0:
            end = lifter.subtract(index, lifter.size(size))
            conditions.append(lifter.formula.emit(aten.lt.Tensor, [end, 0], {}, torch.bool))
        for condition in conditions:
            inside = lifter.formula.emit(aten.bitwise_and.Tensor, [inside, condition], {}, torch.bool)
        inner[dim] = lifter.formula.hold_back(index) if conditions else index
    dtype = node.meta["val"].dtype
    fill = bool(value) if dtype == torch.bool else value
    return lifter.formula.select(inside, lifter.element(source, tuple(inner)), fill, dtype)


@_rule(aten.index.Tensor)
def _lift_index(lifter: Lifter, node: Node, indices: Indices) -> Element:
    source, entries = _arguments(node)
    given = [position for position, entry in enumerate(entries) if entry is not None]
    if given != list(range(given[0], given[-1] + 1)) or any(entries[p].meta["val"].dtype == torch.bool for p in given):
        raise NoRuleError("it rearranges elements in a way that has no rule")
    tensors = [entries[p] for p in given]
    num_broadcast = max(len(t.meta["val"].shape) for t in tensors)
    first = given[0]
    shared = indices[first : first + num_broadcast]
    looked_up = [lifter.element(t, shared[num_broadcast - len(t.meta["val"].shape) :]) for t in tensors]
    sizes = source.meta["val"].shape[first : first + len(given)]
    looked_up = [_count_from_end(lifter, entry, size) for entry, size in zip(looked_up, sizes, strict=True)]
    return lifter.element(source, (*indices[:first], *looked_up, *indices[first + num_broadcast :]))


def _count_from_end(lifter: Lifter, entry: Element, size: Any) -> Element:
    """Return the index that an entry of a lookup stands for: a negative one counts from the end."""
    if lifter.formula.is_position(entry):
        return entry
    from_end = lifter.formula.emit(aten.add.Tensor, [entry, lifter.size(size)], {}, torch.int64)
    is_negative = lifter.formula.emit(aten.lt.Tensor, [entry, 0], {}, torch.bool)
    return lifter.formula.select(is_negative, from_end, entry, torch.int64)


@_rule(aten.index_select.default)
def _lift_index_select(lifter: Lifter, node: Node, indices: Indices) -> Element:
    source, dim, entries = _arguments(node)
    dim = dim % len(indices)
    entry = lifter.element(entries, (indices[dim],))
    return lifter.element(source, (*indices[:dim], entry, *indices[dim + 1 :]))
