"""Compute a mask for the whole prompt, where the model computes it for this rank's stretch.

    pad: (B, S/n)
    mask = (arange(S/n) <= arange(S/n)[:, None]) & pad[:, None, None]             sees the stretch as a prompt

becomes

    pads = all_gather(pad): (B, S)
    mask = (arange(S) <= arange(S)[:, None]) & pads[:, None, None]

What it starts from is gathered along its tokens, and sizes are multiplied; of earlier chunks every rank knows all.
That is right if a mask says of each pair of tokens the same whatever the length: both masks are lifted, and their
formulas have to be equal.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from flexprefill_compile.settings.config import SparsePrefillConfig
from flexprefill_compile.settings.rank_groups import RankGroup
from flexprefill_compile.torch_internals import guard_or_false, is_parameter, statically_known_true

from ..graph.nodes import example_of
from ..graph.trace import IS_INPUT, ancestors_of
from ..lift.elements import ElementFunction
from ..lift.lifted_site import LiftedSite, lift_site
from ..match.site import AttentionSite
from ..rewrite.insertion import Insert, start_inserting
from .earlier_chunks import Lengths
from .exchange import gather
from .positions import name_operation
from .refusals import refuse

# Their whole numbers may be sizes. In arithmetic and comparisons a number is a number.
_TAKE_SIZES = [
    "arange",
    "zeros",
    "ones",
    "full",
    "empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "expand",
    "view",
    "reshape",
    "repeat",
    "broadcast_to",
    "getitem",
    "narrow",
    "slice",
    "unflatten",
]


class WholeMasks:
    """The masks of one graph, each computed once for the whole prompt."""

    def __init__(self, graph: Graph, config: SparsePrefillConfig, group: RankGroup) -> None:
        self._graph = graph
        self._config = config
        self._group = group
        self._inputs: dict[tuple[Node, str], Node] = {}
        self._masks: dict[Node, Node] = {}
        self._checked: set[Node] = set()

    def compute(self, mask: Node, call: Node, lengths: Lengths) -> Node:
        """Return the mask of a call for the whole prompt: (B|1, H|1, S, P + S) for one of (B|1, H|1, S/n, P + S/n).

        Args:
            mask: As the model gives it.
            call: The attention, before which the graph is inserting.
            lengths: Of its queries and keys.

        Raises:
            SequenceParallelError: The mask can't be computed from what is known of it.
        """
        if mask not in self._masks:
            insert = start_inserting(self._graph, call)
            self._masks[mask] = _Widening(self._group, lengths, insert, call, self._inputs).widen(mask)
        return self._masks[mask]

    def check(self, mask: Node, stretch: AttentionSite, whole: AttentionSite) -> None:
        """Raise unless the mask of the whole prompt has the formula of the stretch's.

        Args:
            mask: As the model gives it.
            stretch: The call under it.
            whole: The call over the whole prompt.

        Raises:
            SequenceParallelError: It has another, or one of them has none.
        """
        if mask in self._checked:
            return
        self._checked.add(mask)
        lifted = [lift_site(site, self._config, {}) for site in (stretch, whole)]
        for result in lifted:
            if not isinstance(result, LiftedSite):
                reason, detail = result
                raise refuse(stretch.node, f"its mask isn't understood: {reason.value} ({detail})")
        own, others = (_describe(result) for result in lifted if isinstance(result, LiftedSite))
        if own != others:
            raise refuse(stretch.node, "its mask depends on the length of the stretch")


class _Widening:
    """Copies what computes a mask, with the sizes of the whole prompt."""

    def __init__(
        self,
        group: RankGroup,
        lengths: Lengths,
        insert: Insert,
        call: Node,
        inputs: dict[tuple[Node, str], Node],
    ) -> None:
        self.group = group
        self.lengths = lengths
        self.insert = insert
        self.call = call
        self.inputs = inputs

    def widen(self, mask: Node) -> Node:
        ancestors = _ancestors_of_mask(mask)
        copies: dict[Node, Any] = {}
        for node in ancestors:
            copies[node] = self._widen_input(node) if _is_input(node) else self._copy(node, copies)
        whole: Node = copies[mask]
        expected = [self.lengths.widen(size) for size in example_of(mask).shape]
        if not _same_shape(example_of(whole).shape, expected):
            raise refuse(self.call, f"its mask comes out as {tuple(example_of(whole).shape)}, not {tuple(expected)}")
        return whole

    def _widen_input(self, node: Node) -> Node:
        key = node, str(example_of(self.lengths.past))
        if key not in self.inputs:
            example = example_of(node)
            widened = self._widen_tensor(node, example) if isinstance(example, Tensor) else self._widen_size(node)
            self.inputs[key] = widened
        return self.inputs[key]

    def _widen_tensor(self, node: Node, example: Tensor) -> Node:
        if is_parameter(node):
            return node
        for size in example.shape:
            # A mask of all keys comes with a symbol of its own: from here on it is known to be theirs.
            guard_or_false(size == example_of(self.lengths.past) + example_of(self.lengths.stretch))
        dims = [dim for dim, size in enumerate(example.shape) if self._hangs_on_the_stretch(size)]
        if not dims:
            return node
        if len(dims) > 1:
            raise refuse(self.call, f"its mask is given for the stretch alone: {tuple(example.shape)}")
        (dim,) = dims
        if self.lengths.is_stretch(example.shape[dim]):
            widened = gather(self.insert, node, dim, self.group)
        else:
            past, own = self.lengths.past, self.lengths.stretch
            earlier = self.insert(torch.narrow, node, dim, 0, past)
            stretch = self.insert(torch.narrow, node, dim, past, own)
            widened = self.insert(torch.cat, (earlier, gather(self.insert, stretch, dim, self.group)), dim)
        widened.meta[IS_INPUT] = True
        return widened

    def _widen_size(self, node: Node) -> Node:
        size = example_of(node)
        if self.lengths.is_stretch(size):
            return self.insert(operator.mul, node, self.group.size)
        if self.lengths.is_all_keys(size):
            others = self.insert(operator.mul, self.lengths.stretch, self.group.size - 1)
            return self.insert(operator.add, node, others)
        stretch = example_of(self.lengths.stretch)
        own = getattr(getattr(stretch, "node", None), "expr", None)
        if isinstance(size, SymInt) and own is not None and size.node.expr.free_symbols & own.free_symbols:
            raise refuse(self.call, f"its mask needs the size {size}, of a stretch of {stretch} tokens")
        return node

    def _copy(self, node: Node, copies: dict[Node, Any]) -> Node:
        takes_sizes = name_operation(node) in _TAKE_SIZES
        arguments, keywords = map_arg((node.args, node.kwargs), lambda n: copies[n])
        if takes_sizes:
            arguments, keywords = (_map_integers(self.lengths.widen, values) for values in (arguments, keywords))
        else:
            self._check_numbers(node)
        copied = self.call.graph.create_node(node.op, node.target, arguments, keywords)
        copied.meta = {name: node.meta[name] for name in ("nn_module_stack", "stack_trace") if name in node.meta}
        values, named = map_arg((arguments, keywords), example_of)
        try:
            with torch.no_grad(), example_of(self.call).fake_mode:
                if node.op == "call_method":
                    example = getattr(values[0], str(node.target))(*values[1:], **named)
                else:
                    function: Any = node.target
                    example = function(*values, **named)
        except Exception as error:
            message = str(error).partition("\n")[0][:200]
            raise refuse(self.call, f"its mask can't be computed for the whole prompt: {message}") from None
        copied.meta["example_value"] = example
        return copied

    def _hangs_on_the_stretch(self, size: Any) -> bool:
        return self.lengths.is_stretch(size) or self.lengths.is_all_keys(size)

    def _check_numbers(self, node: Node) -> None:
        """Raise where arithmetic has a number that may be one of the lengths."""
        for number in (*node.args, *node.kwargs.values()):
            if isinstance(number, int) and self._hangs_on_the_stretch(number):
                what = "the length of the stretch" if self.lengths.is_stretch(number) else "the number of its keys"
                raise refuse(self.call, f"a number in its mask, {number}, may be {what}; use dynamic=True")


def _is_input(node: Node) -> bool:
    return node.op in ("placeholder", "get_attr") or isinstance(example_of(node), SymInt)


def _ancestors_of_mask(mask: Node) -> list[Node]:
    found: set[Node] = set()
    waiting = [mask]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend([] if _is_input(node) else node.all_input_nodes)
    return [node for node in mask.graph.nodes if node in found]


def _map_integers(function: Callable[[int], Any], value: Any) -> Any:
    """Apply a function to the whole numbers among arguments, those of slices and sequences too."""
    if isinstance(value, slice):
        return slice(*(_map_integers(function, x) for x in (value.start, value.stop, value.step)))
    if isinstance(value, tuple | list):
        return type(value)(_map_integers(function, x) for x in value)
    if isinstance(value, dict):
        return {name: _map_integers(function, x) for name, x in value.items()}
    return function(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _same_shape(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def _describe(lifted: LiftedSite) -> object:
    """Return what two masks have in common if they say the same of each pair of tokens."""
    bounds, parts = lifted.bounds, lifted.parts
    functions = (_describe_function(function) for function in (parts.mask, parts.bias))
    return bounds.is_causal, bounds.is_packed, parts.softcap, *functions


def _describe_function(function: ElementFunction | None) -> object:
    if function is None:
        return None
    captures = [(capture.positions, _list_operations(capture.node)) for capture in function.captures]
    return function.module.code, captures


def _list_operations(node: Node) -> list[str]:
    ancestors = ancestors_of(node)
    return [str(n.target) for n in node.graph.nodes if n in ancestors and n.op == "call_function"]
