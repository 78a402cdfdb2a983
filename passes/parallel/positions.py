"""Find what a model counts by its own tokens, where it holds a stretch of the prompt: positions that would be wrong.

position = arange(S/n)                      counts from 0 on every rank
cos = cached_cos[:S/n]                      likewise
position = padding.cumsum(-1) - 1           counts what the rank holds
state = conv1d(x, ...)                      needs the tokens before the stretch
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from flexprefill_compile.torch_internals import statically_known_true

from ..graph.nodes import argument, example_of
from ..match.sdpa import is_sdpa

# They make something of a token out of its neighbours. With the place of their dimension among the arguments.
_SCANS = {"cumsum": 1, "cumprod": 1, "cummax": 1, "cummin": 1, "logcumsumexp": 1, "flip": 1, "diff": 2, "roll": 2}
_CONVOLUTIONS = frozenset({"conv1d", "causal_conv1d_fn"})
_SLICES = frozenset({"getitem", "narrow", "slice"})


def find_local_positions(graph: Graph, lengths: Iterable[Any]) -> dict[Node, Node]:
    """Return the nodes whose values hang on where the stretch begins, each with the operation that brought that in.

    What masks are made of counts as well; they are computed anew for the whole prompt.

    Args:
        graph: A dynamo graph.
        lengths: Of the stretches: the query lengths of its attention calls.
    """
    lengths = list(lengths)
    found: dict[Node, Node] = {}
    for node in graph.nodes:
        if not isinstance(example_of(node), Tensor):
            if isinstance(example_of(node), tuple | list):
                _inherit(node, node.all_input_nodes, found)
            continue
        _inherit(node, _operands(node), found)
        if node not in found and _counts_tokens(node, lengths):
            found[node] = node
    return found


def name_operation(node: Node) -> str:
    """Return what a node calls, without its module: "arange", "getitem", "cumsum"."""
    if node.op == "call_method":
        return str(node.target)
    packet = getattr(node.target, "overloadpacket", node.target)
    return getattr(packet, "__name__", str(packet)) if node.op == "call_function" else ""


def _inherit(node: Node, inputs: Iterable[Node], found: dict[Node, Node]) -> None:
    source = next((found[x] for x in inputs if x in found), None)
    if source is not None:
        found[node] = source


def _operands(node: Node) -> list[Node]:
    if is_sdpa(node):  # but not its mask
        operands = (argument(node, number, name) for number, name in enumerate(("query", "key", "value")))
        return [x for x in operands if isinstance(x, Node)]
    return node.all_input_nodes


def _counts_tokens(node: Node, lengths: list[Any]) -> bool:
    name = name_operation(node)
    shape = example_of(node).shape
    if name == "arange":
        return _is_any(shape[0], lengths)
    if name in _CONVOLUTIONS:
        return True
    if name in _SCANS:
        dim = argument(node, _SCANS[name], "dim", "dims")
        dim = dim[0] if isinstance(dim, tuple | list) and dim else dim
        return not isinstance(dim, int) or _is_any(shape[dim], lengths)
    return name in _SLICES and _starts_a_table(node, lengths)


def _starts_a_table(node: Node, lengths: list[Any]) -> bool:
    """Tell whether a node cuts as many entries as the stretch has tokens out of a longer tensor."""
    source = node.args[0] if node.args else None
    before = example_of(source) if isinstance(source, Node) else None
    if not isinstance(before, Tensor):
        return False
    after = example_of(node)
    cut = [size for size in after.shape if _is_any(size, lengths)]
    kept = [size for size in before.shape if _is_any(size, lengths)]
    return len(cut) > len(kept)


def _is_any(size: Any, lengths: list[Any]) -> bool:
    return any(statically_known_true(size == length) for length in lengths)
