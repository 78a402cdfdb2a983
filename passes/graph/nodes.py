"""What a node holds: its arguments, its example value and its place in the model."""

from __future__ import annotations

import re
from typing import Any

from torch.fx import Node

# How dynamo says where a frame has a module from: a variable of it, local or global, and what leads on from there.
_ROOT = re.compile(r"[LG]\['(?P<variable>\w+)'\]")
_SUBSCRIPTS = re.compile(r"(\[[^]]*\])*")
_PLUMBING = re.compile(r"(\[[^]]*\]|\.(__\w+__|func|args|keywords|cell_contents|_orig_mod)(?=[.[]|$))*")


def example_of(argument: Any) -> Any:
    """Return the fake tensor or symbolic number that a node stands for; a constant stands for itself."""
    if not isinstance(argument, Node):
        return argument
    return argument.meta.get("example_value", argument.meta.get("val"))


def name_of(node: Node) -> str:
    """Return the path of the submodule that a node belongs to, or the node's own name outside of any.

    L['self'].model.layers.0          ->  model.layers.0
    L['args'][0].model.layers.0       ->  model.layers.0        in a wrapper, whose own module is an argument
    L['model'].layers.0               ->  model.layers.0        in a function that calls ``model``
    L['layers'][0]                    ->  layers[0]             in a function that calls each of ``layers``
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    paths = [str(path) for path, _ in stack.values()]
    path, root = paths[-1], _ROOT.match(paths[-1])
    if root is None:
        return path.lstrip(".") or node.name
    # A module that a frame calls is on the stack, unlike the one whose forward the frame is.
    is_called = root["variable"] not in ("self", "fn") and paths[0] == path[: _end(_SUBSCRIPTS, root)]
    if is_called:
        return root["variable"] + path[root.end() :]
    return path[_end(_PLUMBING, root) :].lstrip(".") or node.name


def _end(pattern: re.Pattern[str], root: re.Match[str]) -> int:
    """Return where a pattern that goes on from a root ends."""
    following = pattern.match(root.string, root.end())
    return root.end() if following is None else following.end()


def argument(node: Node, position: int, *names: str) -> Any:
    """Return an argument by its position, the tensor of a method being number 0, or by any of its names; else None."""
    if position < len(node.args):
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), None)


def first_input(node: Node) -> Node | None:
    """Return the tensor that an operation on one tensor takes, where it is a node."""
    tensor = argument(node, 0, "input", "self")
    return tensor if isinstance(tensor, Node) else None
