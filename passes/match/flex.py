"""Describe a FlexAttention call that dynamo captured inside a model, or tell why it stays as it is. Never mutates.

    flex_attention = flex_attention(q, k, v, score_mod, (Sq, Skv, *tables, mask_mod), scale, kernel_options, (), ())
    out = flex_attention[0]

``out`` is the site's node. The other outputs, the logsumexp among them, must have no use.
"""

from __future__ import annotations

import operator
from typing import Any, cast

from torch.fx import GraphModule, Node

from flexprefill_compile.report import Skipped, SkipReason
from flexprefill_compile.settings.config import SparsePrefillConfig
from flexprefill_compile.torch_internals import flex_attention_hop

from ..graph.nodes import example_of, name_of
from ..graph.operations import live_users
from .operands import Operand, share_key_heads
from .prefill_lengths import refuse_lengths
from .refusals import Refusal, refuse_decode, refuse_gradient, refuse_heads, refuse_tensors
from .site import AttentionSite, FlexMods, describe_shapes


def is_flex_attention(node: Node) -> bool:
    """Tell whether a node is a FlexAttention call."""
    return node.op == "call_function" and node.target is flex_attention_hop


def match_flex(call: Node, config: SparsePrefillConfig) -> AttentionSite | Skipped | None:
    """Check one FlexAttention call: return what the rewrite needs, why it stays as it is, or None if nobody uses it.

    Args:
        call: A node for which ``is_flex_attention`` holds.
        config: How short a prompt stays as it is.
    """
    users = live_users(call)
    if not users:
        return None
    arguments: tuple[Any, ...] = call.args
    query, key, value, score_mod, block_mask, scale, kernel_options, *captures = arguments
    examples = [example_of(x) for x in (query, key, value)]
    output = users[0]
    refusal = _refuse_outputs(users) or (
        refuse_tensors(*examples, example_of(output))
        or refuse_decode(examples[0])
        or refuse_gradient(example_of(output))
        or refuse_heads(*examples, enable_gqa=True)
        or refuse_lengths(examples[0].shape[-2], examples[1].shape[-2], config, is_causal=False)
    )
    if refusal is not None:
        return Skipped(name_of(call), describe_shapes(*examples[:2]), *refusal)

    shared_key, shared_value = share_key_heads(Operand(key, call), Operand(value, call), call)
    score_captures, mask_captures = captures or ((), ())
    return AttentionSite(
        node=output,
        name=name_of(call),
        query=query,
        key=shared_key.node,
        value=shared_value.node,
        scores=FlexMods(
            score_mod=_module_of(score_mod),
            mask_mod=_module_of(block_mask[-1]),
            score_captures=tuple(score_captures),
            mask_captures=tuple(mask_captures),
            block_mask=tuple(block_mask),
            kernel_options=kernel_options,
        ),
        scale=float(example_of(scale)),
        dtype=example_of(output).dtype,
        shapes=describe_shapes(examples[0], example_of(shared_key.node)),
    )


def _refuse_outputs(users: list[Node]) -> Refusal | None:
    is_output_alone = len(users) == 1 and users[0].target is operator.getitem and users[0].args[1] == 0
    return None if is_output_alone else (SkipReason.WEIGHTS_USED, "")


def _module_of(node: Node) -> GraphModule:
    return cast("GraphModule", getattr(node.graph.owning_module, str(node.target)))
