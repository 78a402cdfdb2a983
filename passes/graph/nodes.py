"""What a node holds: its arguments, its example value and its place in the model."""

from __future__ import annotations

from typing import Any

from torch.fx import Node


def example_of(argument: Any) -> Any:
    """Return the fake tensor or symbolic number that a node stands for; a constant stands for itself."""
    if not isinstance(argument, Node):
        return argument
    return argument.meta.get("example_value", argument.meta.get("val"))


def name_of(node: Node) -> str:
    """Return the path of the submodule that a node belongs to, or the node's own name outside of any."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    path = list(stack.values())[-1][0]
    return path.removeprefix("L['self']").removeprefix("L['fn']").lstrip(".") or node.name


def argument(node: Node, position: int, *names: str) -> Any:
    """Return an argument by its position, the tensor of a method being number 0, or by any of its names; else None."""
    if position < len(node.args):
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), None)


def first_input(node: Node) -> Node | None:
    """Return the tensor that an operation on one tensor takes, where it is a node."""
    tensor = argument(node, 0, "input", "self")
    return tensor if isinstance(tensor, Node) else None
