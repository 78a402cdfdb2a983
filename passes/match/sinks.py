"""Recognise sinks: one more logit for each head, joined to the logits of its keys and dropped after the softmax.

    joined = cat([logits, sinks.reshape(1, -1, 1, 1).expand(B, -1, Sq, -1)], dim=-1)
    weights = softmax(joined - joined.max(dim=-1, keepdim=True).values, dim=-1)[..., :-1]

A sink takes its share of the softmax and gives nothing to the output. Never mutates. Source: gpt-oss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import Node

from flexprefill_compile.torch_internals import statically_known_true

from ..graph.edits import edited_inputs, shares_memory
from ..graph.nodes import argument, example_of, first_input
from ..graph.operations import EXPANSIONS, is_last_dimension, live_users, operation
from .operands import Operand, is_edited

_DROPS_LAST = (Ellipsis, slice(None, -1, None))


class Sinks(NamedTuple):
    """The sinks of an attention that is written out.

    Attributes:
        node: The node of (1, H, 1, 1), the logit of each head's sink.
        logits: The node that they are joined to, of (B, H, Sq, Skv).
        weights: The node of the softmax's result without them, likewise.
        joined: The nodes of (B, H, Sq, Skv + 1).
    """

    node: Node
    logits: Node
    weights: Node
    joined: tuple[Node, ...]


def find_sinks(softmax: Node, joined: Node) -> Sinks | None:
    """Return the sinks of a softmax, or None if it has none, or none in a form that is understood.

    Args:
        softmax: A softmax over the last dimension.
        joined: What it takes, before the maximum of each row is taken off.
    """
    pair = argument(joined, 0, "tensors")
    if operation(joined) not in {"cat", "concat"} or not isinstance(pair, list | tuple) or len(pair) != 2:
        return None
    logits, expanded = pair
    users = live_users(softmax)
    if not isinstance(logits, Node) or not isinstance(expanded, Node) or len(users) != 1:
        return None
    (weights,) = users
    node = _undo_expansions(expanded, example_of(logits))
    if not _drops_last(weights) or node is None or not is_last_dimension(argument(joined, 1, "dim"), 4):
        return None
    shifted = first_input(softmax)
    return Sinks(node, logits, weights, tuple(dict.fromkeys((joined, shifted or joined, softmax))))


def _drops_last(node: Node) -> bool:
    """Tell whether a node is ``x[..., :-1]``, as dynamo writes it or as torch.export does."""
    if operation(node) == "slice":
        dim, *bounds = (*node.args[1:], 1)[:4]
        return is_last_dimension(dim, 4) and bounds == [0, -1, 1]
    return operation(node) == "getitem" and bool(node.args[1] == _DROPS_LAST)


def are_edited(sinks: Sinks, output: Node) -> bool:
    """Tell whether the sinks, or what they are joined to, are edited in place before the attention's output."""
    if is_edited(Operand(sinks.node, sinks.joined[0]), output):
        return True
    node = sinks.joined[0].next
    while node is not output:
        edited = [example_of(tensor) for tensor in edited_inputs(node)]
        if any(shares_memory(joined, tensor) for joined in sinks.joined for tensor in edited):
            return True
        node = node.next
    return False


def _undo_expansions(expanded: Node, logits: Any) -> Node | None:
    """Return the (1, H, 1, 1) that is repeated for each row of each prompt; None where it is none."""
    if not isinstance(logits, Tensor) or logits.dim() != 4:
        return None
    _, heads, *_ = logits.shape
    if not _has_shape(expanded, (*logits.shape[:3], 1)):
        return None
    node: Node | None = expanded
    while node is not None and not _has_shape(node, (1, heads, 1, 1)):
        node = first_input(node) if operation(node) in EXPANSIONS else None
    return node


def _has_shape(node: Node, shape: Sequence[Any]) -> bool:
    own = getattr(example_of(node), "shape", ())
    return len(own) == len(shape) and all(statically_known_true(a == b) for a, b in zip(own, shape, strict=True))
