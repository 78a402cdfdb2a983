"""Follow an operand of attention back to the 4-D tensor that it is made of. Never mutates.

    key.view(B * H, S, D)                                              ->  key           (Bloom)
    key.transpose(2, 3)                                                ->  key           (the second factor of Q K^T)
    x[:, :, None].expand(B, Hkv, n, S, D).reshape(B, Hkv * n, S, D)    ->  x             (repeat_kv)
    repeat_interleave(x, n, dim=1)                                     ->  x
    x.expand(B, H, S, D), of one key head                              ->  x
    key.to(float32), of a bfloat16 key                                 ->  key           (nothing is lost)

Only where shapes prove it. A view is one of operations.VIEWS, which keep the elements in order: what a chain of them
does follows from its first and last shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from flexprefill_compile.torch_internals import statically_known_true

from ..graph.edits import edited_inputs, shares_memory
from ..graph.nodes import argument, example_of, first_input
from ..graph.operations import CASTS, EXPANSIONS, TRANSPOSITIONS, VIEWS, operation


class Operand(NamedTuple):
    """A tensor that an operation takes, or what that tensor was made of.

    Attributes:
        node: The node of the tensor.
        reader: The first node that reads it, on the way to the operation. A rewrite reads the tensor later.
    """

    node: Node
    reader: Node

    @property
    def shape(self) -> Sequence[Any]:
        """The sizes, symbolic ones among them."""
        example = example_of(self.node)
        return example.shape if isinstance(example, Tensor) else ()


def split_heads(operand: Operand) -> Operand | None:
    """Return the (B, H, S, D) of an operand of these dimensions, or of (B * H, S, D) made of them."""
    return next((earlier for earlier in _undo_views(operand) if merges_heads(earlier.shape, operand.shape)), None)


def transpose_back(operand: Operand) -> Operand | None:
    """Return the (B, H, S, D) of an operand of (B, H, D, S) or (B * H, D, S) that is a transposition of it."""
    for earlier in _undo_views(operand):
        source = first_input(earlier.node)
        keeps_matrices = _same_shape(earlier.shape, operand.shape) or merges_heads(earlier.shape, operand.shape)
        if source is not None and keeps_matrices and _swaps_last_dimensions(earlier.node):
            return split_heads(Operand(source, earlier.node))
    return None


def _undo_repetition(operand: Operand) -> Operand:
    """Return the (B, Hkv, S, D) of an operand of (B, H, S, D) whose heads repeat it; else the operand.

    Query head h has to attend with head h // (H / Hkv) of what is returned.
    """
    for repeated in _undo_views(operand):
        source = first_input(repeated.node)
        if source is None:
            continue
        if operation(repeated.node) in EXPANSIONS:
            return _undo_expansion(operand, repeated, Operand(source, repeated.node)) or operand
        if operation(repeated.node) == "repeat_interleave" and _same_shape(repeated.shape, operand.shape):
            dimension, count = argument(repeated.node, 2, "dim"), argument(repeated.node, 1, "repeats")
            is_per_head = dimension in {1, -3} and isinstance(count, int) and len(operand.shape) == 4
            return Operand(source, repeated.node) if is_per_head else operand
    return operand


def undo_upcast(operand: Operand) -> Operand:
    """Return what an operand was before casts that represent every value of it."""
    while (source := _before_upcast(operand.node)) is not None:
        operand = Operand(source, operand.node)
    return operand


def share_key_heads(key: Operand, value: Operand, until: Node) -> tuple[Operand, Operand]:
    """Undo the repetition of key and value heads, where both repeat the same number of heads.

    Args:
        key: The operand of (B, H, Skv, D).
        value: The operand of (B, H, Skv, Dv).
        until: Where what is returned will be read; its memory must not be edited before.
    """
    shared = _undo_repetition(key), _undo_repetition(value)
    num_heads = [operand.shape[1:2] for operand in shared]
    if not _same_shape(*num_heads) or any(is_edited(operand, until) for operand in shared):
        return key, value
    return shared


def is_edited(operand: Operand, until: Node) -> bool:
    """Tell whether the memory of an operand is edited between its reader and a later node, or the same."""
    tensor = example_of(operand.node)
    node = operand.reader
    while node is not until:
        if any(shares_memory(edited, tensor) for edited in edited_inputs(node)):
            return True
        node = node.next
    return False


def _swaps_last_dimensions(node: Node) -> bool:
    """Tell whether a node transposes the last two dimensions of a tensor and leaves the others where they are."""
    name = operation(node)
    if name not in TRANSPOSITIONS:
        return False
    if name == "mT":
        return True
    given = node.args[1:] or tuple(value for key, value in node.kwargs.items() if key not in {"input", "self"})
    dimensions = given[0] if len(given) == 1 and isinstance(given[0], tuple | list) else given
    rank = len(Operand(node, node).shape)
    if rank < 2:
        return False
    order = [dimension % rank for dimension in dimensions if isinstance(dimension, int)]
    if name == "permute":
        return order == [*range(rank - 2), rank - 1, rank - 2]
    return sorted(order) == [rank - 2, rank - 1]


def merges_heads(split: Sequence[Any], merged: Sequence[Any]) -> bool:
    """Tell whether ``split`` is (B, H, *, *) and ``merged`` the same, or (B * H, *, *)."""
    if len(split) != 4:
        return False
    return _same_shape(split, merged) or _same_shape((split[0] * split[1], *split[2:]), merged)


def _same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Tell whether two shapes are known to be equal, without a guard."""
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def _undo_views(operand: Operand) -> Iterator[Operand]:
    """Yield the operand, then what it was before each view of it, or cast that loses nothing, from the last on."""
    yield operand
    while (source := _before_view(operand.node) or _before_upcast(operand.node)) is not None:
        operand = Operand(source, operand.node)
        yield operand


def _undo_expansion(operand: Operand, expanded: Operand, source: Operand) -> Operand | None:
    """Return the (B, Hkv, S, D) of which ``operand``, a view of ``expanded``, repeats each head."""
    if len(operand.shape) != 4 or len(source.shape) != len(expanded.shape):
        return None
    batch, num_heads, length, head_dim = operand.shape
    num_kv_heads, group = expanded.shape[1:3] if len(expanded.shape) == 5 else (1, num_heads)
    middle = (num_kv_heads, group) if len(expanded.shape) == 5 else (group,)
    unexpanded = (num_kv_heads, 1) if len(expanded.shape) == 5 else (1,)
    repeats_each_head = (
        _same_shape(source.shape, (batch, *unexpanded, length, head_dim))
        and _same_shape(expanded.shape, (batch, *middle, length, head_dim))
        and _same_shape(operand.shape, (batch, num_kv_heads * group, length, head_dim))
    )
    heads = (batch, num_kv_heads, length, head_dim)
    found = (earlier for earlier in _undo_views(source) if _same_shape(earlier.shape, heads))
    return next(found, None) if repeats_each_head else None


def _before_view(node: Node) -> Node | None:
    """Return the tensor that a node is a view of, in the same order of elements; None where it is no such view."""
    source = first_input(node)
    is_view = operation(node) in VIEWS or (operation(node) == "getitem" and _only_adds_dimensions(node.args[1]))
    if source is None or not is_view:
        return None
    before, after = example_of(source), example_of(node)
    are_tensors = isinstance(before, Tensor) and isinstance(after, Tensor)
    return source if are_tensors and before.dtype == after.dtype else None  # x.view(dtype) reads other numbers


def _only_adds_dimensions(index: Any) -> bool:
    """Tell whether ``x[index]`` holds all of x: the index is made of None, ..., and : alone."""
    index = index if isinstance(index, tuple) else (index,)
    return all(item is None or item is Ellipsis or item == slice(None) for item in index)


def _before_upcast(node: Node) -> Node | None:
    """Return the tensor that a node casts to a dtype that holds all its values; None where it is no such cast."""
    source = first_input(node)
    if source is None or operation(node) not in CASTS:
        return None
    before, after = example_of(source), example_of(node)
    loses_nothing = (
        isinstance(before, Tensor)
        and before.is_floating_point()
        and before.device == after.device
        and torch.promote_types(before.dtype, after.dtype) == after.dtype
    )
    return source if loses_nothing else None
