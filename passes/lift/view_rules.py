"""How an index goes through a view: each rule finds the same element in what was viewed.

Each rule gets the indices of an element of a node's result and returns the element.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from flexprefill_compile.torch_internals import statically_known_true

from .elements import Element, Indices, NoRuleError, broadcast
from .lifter import Lifter, Rule, add_rule

aten = torch.ops.aten

VIEW_RULES: dict[Any, Rule] = {}
_rule = functools.partial(add_rule, VIEW_RULES)


def _arguments(node: Node) -> Any:
    """Return the arguments as they stand, of whatever types the operation's schema says."""
    return node.args


@_rule(
    aten.alias.default, aten.detach.default, aten.clone.default, aten.lift_fresh_copy.default, aten.contiguous.default
)
def _lift_same(lifter: Lifter, node: Node, indices: Indices) -> Element:
    return lifter.element(_arguments(node)[0], indices)


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
