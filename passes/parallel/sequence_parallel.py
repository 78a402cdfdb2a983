"""The pass of ``sequence_parallel``: spread every attention call over the ranks that share a prompt.

    out = scaled_dot_product_attention(q, k, v, is_causal=True)                  (B, H, S/n, D)

becomes

    qs, ks, vs = all_to_all(q), all_to_all(k), all_to_all(v)                     (B, H/n, S, D)
    outs = scaled_dot_product_attention(qs, ks, vs, is_causal=True)
    out = all_to_all(outs)                                                       (B, H, S/n, D)

A later chunk of the prompt attends to keys of earlier ones as well, which every rank has: it takes its heads of them.

It runs before anything is made sparse: what the sparse pass finds is an ordinary call, over the whole prompt and some
of the heads. So selection needs no change, and calls that stay dense are right as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from flexprefill_compile.settings.config import SparsePrefillConfig
from flexprefill_compile.settings.rank_groups import RankGroup

from ..base import GraphPass, graph_modules
from ..graph.nodes import example_of, name_of
from ..match.operands import Operand, share_key_heads
from ..match.sdpa import bind_arguments, is_sdpa
from ..match.site import AttentionSite, Masked, describe_shapes
from ..rewrite.insertion import Insert, start_inserting
from .earlier_chunks import Chunk, Lengths, split_chunk
from .exchange import exchange_heads, exchange_tokens, own_heads, repeat_key_heads
from .positions import find_local_positions, name_operation
from .refusals import check_call, check_form, is_decode, refuse
from .whole_mask import WholeMasks


class SequenceParallelPass(GraphPass):
    """Spread the prefill attention of a graph over the ranks of a group, in place.

    Attributes:
        calls: After the run, the attention calls that were spread, by name and query heads.
        length: After the run, the length of the stretch, a number or a symbol; None where no call was spread.
        past: After the run, which inputs of the graph hold keys and values of earlier chunks, by their places.
    """

    def __init__(self, config: SparsePrefillConfig, group: RankGroup) -> None:
        self.config = config
        self.group = group
        self.calls: list[str] = []
        self.length: Any = None
        self.past: list[int] = []
        self._inputs: list[Node] = []

    def run(self, graph_module: GraphModule) -> None:
        """Spread the calls of the graph.

        Raises:
            SequenceParallelError: An attention call, its mask or its positions would come out wrong.
        """
        self._inputs = list(graph_module.graph.find_nodes(op="placeholder"))
        for module in graph_modules(graph_module):
            for node in module.graph.nodes:
                check_form(node)
            calls = [node for node in module.graph.nodes if is_sdpa(node) and not is_decode(bind_arguments(node))]
            arguments = {call: bind_arguments(call) for call in calls}
            for call in calls:
                check_call(call, arguments[call], self.group)
                if module is not graph_module:
                    raise refuse(call, "it is in a region of its own, which doesn't show where positions come from")
            lengths = [example_of(arguments[call]["query"]).shape[2] for call in calls]
            local = find_local_positions(module.graph, lengths)
            masks = WholeMasks(module.graph, self.config, self.group)
            for call in calls:
                _check_positions(call, arguments[call], local)
                self.calls.append(f"{name_of(call)}: {int(example_of(call).shape[1])} heads")
                self._spread(call, arguments[call], masks)
            self.length = next(iter(lengths), self.length)

    def _spread(self, call: Node, arguments: dict[str, Any], masks: WholeMasks) -> None:
        graph, query = call.graph, arguments["query"]
        insert = start_inserting(graph, call)
        with graph.inserting_before(call):
            key, value = share_key_heads(Operand(arguments["key"], call), Operand(arguments["value"], call), call)
            length = example_of(query).shape[2]
            chunks = [split_chunk(x.node, call, length, self._inputs) for x in (key, value)]
            past = [chunk.past for chunk in chunks if chunk.past is not None]
            self.past += map(self._inputs.index, past)
            inputs = [self._exchange(insert, x, call) for x in (Chunk(None, query), *chunks)]
            own_mask, mask = arguments["attn_mask"], None
            if own_mask is not None:
                lengths = Lengths(_size(insert, query), _size(insert, past[0]) if past else 0, self.group.size)
                mask = masks.compute(own_mask, call, lengths)
                stretch = _describe_site(call, query, key.node, value.node, own_mask)
                masks.check(own_mask, stretch, _describe_site(call, inputs[0], inputs[1], inputs[2], mask))
            whole = _attend(call, arguments, inputs, self._own_heads(insert, mask, call))
            output = exchange_heads(insert, whole, self.group, tokens_first=not example_of(call).is_contiguous())
        call.replace_all_uses_with(output)
        graph.erase_node(call)

    def _exchange(self, insert: Insert, chunk: Chunk, call: Node) -> Node:
        """Exchange the stretch's tokens for heads, and take this rank's heads of what every rank has."""
        received = exchange_tokens(insert, self._share(insert, chunk.own, call), self.group)
        if chunk.past is None:
            return received
        past = own_heads(insert, self._share(insert, chunk.past, call), self.group)
        return insert(torch.cat, (past, received), 2)

    def _share(self, insert: Insert, x: Node, call: Node) -> Node:
        """Repeat heads until the ranks can share them, in the dtype that autocast would have cast to."""
        dtype = example_of(call).dtype
        cast = x if example_of(x).dtype == dtype else insert(torch.ops.aten.to.dtype, x, dtype)
        return repeat_key_heads(insert, cast, self.group)

    def _own_heads(self, insert: Insert, mask: Node | None, call: Node) -> Node | None:
        """Take the heads of this rank out of a mask that has one for each head."""
        num_heads = int(example_of(call).shape[1])
        if mask is None or example_of(mask).dim() < 3 or example_of(mask).shape[-3] != num_heads or num_heads == 1:
            return mask
        return own_heads(insert, mask, self.group, -3)


def _size(insert: Insert, x: Node) -> Any:
    """Return the tokens of (B, H, S, D): a number, or the node of a symbol."""
    size = example_of(x).shape[2]
    return size if isinstance(size, int) else insert(torch.ops.aten.sym_size.int, x, 2)


def _check_positions(call: Node, arguments: dict[str, Any], local: dict[Node, Node]) -> None:
    for name in ("query", "key", "value"):
        if arguments[name] in local:
            source = name_operation(local[arguments[name]])
            raise refuse(
                call,
                f"its {name} depends on {source} over this rank's own stretch; give the model the positions in the "
                "whole prompt (Hugging Face: position_ids)",
            )


def _attend(call: Node, arguments: dict[str, Any], inputs: list[Node], mask: Node | None) -> Node:
    """Insert the call over the whole prompt."""
    query, key, value = inputs
    keywords = {
        "attn_mask": mask,
        "is_causal": arguments["is_causal"],
        "scale": arguments["scale"],
        "enable_gqa": example_of(query).shape[1] != example_of(key).shape[1],
    }
    whole = call.graph.call_function(F.scaled_dot_product_attention, (query, key, value), keywords)
    with torch.no_grad(), example_of(query).fake_mode:
        example = F.scaled_dot_product_attention(
            *(example_of(x) for x in inputs), **{name: example_of(x) for name, x in keywords.items()}
        )
    whole.meta = dict(call.meta) | {"example_value": example}
    return whole


def _describe_site(call: Node, query: Node, key: Node, value: Node, mask: Node) -> AttentionSite:
    return AttentionSite(
        node=call,
        name=name_of(call),
        query=query,
        key=key,
        value=value,
        scores=Masked(mask),
        scale=1.0,
        dtype=example_of(call).dtype,
        shapes=describe_shapes(example_of(query), example_of(key)),
    )
