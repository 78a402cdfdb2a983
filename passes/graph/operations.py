"""What a node of a dynamo graph does, whichever way the model spells it.

``x.softmax(-1)``, ``torch.softmax(x, -1)``, ``F.softmax(x, -1)`` and ``aten.softmax.int(x, -1)`` are all ``"softmax"``.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node
from torch.nn import functional as F

from flexprefill_compile.torch_internals import OpOverload, OpOverloadPacket

from .edits import edited_inputs
from .nodes import argument


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


SOFTMAX = _names("softmax _softmax _safe_softmax")
PRODUCTS = _names("matmul bmm baddbmm")
_OTHER_PRODUCTS = _names("mm")  # of single matrices
DROPOUT = _names("dropout")
# Their result follows from the shapes before and after: the same elements in the same row-major order.
VIEWS = _names("""
    reshape view view_as reshape_as flatten unflatten unsqueeze squeeze contiguous clone _unsafe_view detach alias
""")
CASTS = _names("to type type_as float half bfloat16 double _to_copy")
EXPANSIONS = _names("expand expand_as broadcast_to repeat")
TRANSPOSITIONS = _names("transpose swapaxes swapdims permute mT")
ELEMENTWISE = _names("""
    add add_ iadd sub sub_ isub rsub subtract mul mul_ imul multiply div div_ itruediv divide truediv true_divide
    neg negative abs pow square sqrt rsqrt exp log tanh tanh_ sigmoid where masked_fill masked_fill_ clamp clamp_
    clamp_min clamp_max clip minimum maximum nan_to_num logical_not logical_and logical_or bitwise_not bitwise_and
    bitwise_or and_ or_ not_ invert eq ne lt le gt ge
""")
# They move elements about, or join tensors, so that the result still holds what went in.
REARRANGEMENTS = _names("""
    getitem gather take_along_dim index_select select slice narrow cat concat stack pad roll flip split chunk unbind
    tril triu repeat_interleave max min amax einsum
""")
# They read a tensor's sizes and not its elements.
_METADATA = _names("size dim shape ndim numel sym_size")

_NAMES = SOFTMAX.union(
    PRODUCTS, _OTHER_PRODUCTS, DROPOUT, VIEWS, CASTS, EXPANSIONS, TRANSPOSITIONS, ELEMENTWISE, REARRANGEMENTS, _METADATA
)
_FUNCTIONS: dict[Any, str] = {
    function: name
    for module in (operator, torch, F, torch.special)
    for name in _NAMES
    if callable(function := getattr(module, name, None))
}


def operation(node: Node) -> str:
    """Return the name of the torch operation that a node performs, or "" where it is none that this module lists."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if node.target is getattr:  # x.mT, x.shape
        return str(node.args[1])
    if isinstance(node.target, OpOverload | OpOverloadPacket):
        return _aten_name(node.target)
    return _FUNCTIONS.get(node.target, "")


def product_operands(product: Node) -> tuple[Any, Any]:
    """Return the two factors of a node whose operation is one of PRODUCTS."""
    if operation(product) == "baddbmm":
        return argument(product, 1, "batch1"), argument(product, 2, "batch2")
    return argument(product, 0, "input", "self"), argument(product, 1, "other", "mat2", "tensor2")


def is_last_dimension(dimension: Any, rank: int) -> bool:
    """Tell whether a ``dim`` argument, one number or a list of one, is the last of ``rank`` dimensions."""
    if isinstance(dimension, list | tuple) and len(dimension) == 1:
        (dimension,) = dimension
    return isinstance(dimension, int) and dimension in {-1, rank - 1}


def live_users(node: Node) -> list[Node]:
    """Return the nodes that use a node's elements and are of use themselves."""
    return [user for user in node.users if operation(user) not in _METADATA and _is_live(user)]


def _is_live(node: Node, depth: int = 8) -> bool:
    """Tell whether a node's value gets anywhere; what has users of users ``depth`` times over is taken to."""
    if depth == 0 or node.op == "output" or node.is_impure() or edited_inputs(node):
        return True
    return any(_is_live(user, depth - 1) for user in node.users)


def _aten_name(target: OpOverload | OpOverloadPacket) -> str:
    packet = target.overloadpacket if isinstance(target, OpOverload) else target
    namespace, _, name = str(packet).rpartition(".")
    return name if namespace == "aten" else ""
