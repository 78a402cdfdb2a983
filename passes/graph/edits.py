"""Edits in place: which tensors a node writes into, and which others see it."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from flexprefill_compile.torch_internals import OpOverload, OpOverloadPacket, share_storage, written_arguments

from .nodes import argument, example_of

# Functions of the operator module, e.g. operator.iadd.
_IN_PLACE_OPERATORS = """
    setitem delitem iadd iand iconcat ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor
"""


def edited_inputs(node: Node) -> list[Node]:
    """Return the tensors that a node changes in place."""
    if isinstance(node.target, OpOverload | OpOverloadPacket):
        edited = [argument(node, position, name) for position, name in written_arguments(node.target)]
    else:
        edited = [argument(node, 0, "input", "self")] if _edits_in_place(node) else []
    return [tensor for tensor in (*edited, node.kwargs.get("out")) if isinstance(tensor, Node)]


def shares_memory(node: Node, tensor: Tensor) -> bool:
    """Tell whether a node's value and a tensor of the same graph are views of one piece of memory."""
    example = example_of(node)
    return isinstance(example, Tensor) and share_storage(example, tensor)


def _edits_in_place(node: Node) -> bool:
    if node.kwargs.get("inplace") is True:
        return True
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in {"__invert__", "__index__"})
    if getattr(node.target, "__module__", None) == "_operator":
        return name in _IN_PLACE_OPERATORS.split()
    return name.endswith("_")
