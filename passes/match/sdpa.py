"""Describe a scaled_dot_product_attention of a dynamo graph, or tell why it stays dense. Never mutates.

out = scaled_dot_product_attention(q, k, v, is_causal=True)              ->  scores IsCausal()
out = scaled_dot_product_attention(q, k, v, attn_mask=mask)              ->  scores Masked(mask)
out = scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), ...)   ->  key k, value v
out = scaled_dot_product_attention(q, k, v)                              ->  Skipped(NOT_CAUSAL)
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from flexprefill_compile.report import Skipped, SkipReason
from flexprefill_compile.settings.config import SparsePrefillConfig
from flexprefill_compile.torch_internals import guard_or_false

from ..graph.nodes import example_of, name_of
from .operands import Operand, share_key_heads
from .prefill_lengths import refuse_lengths
from .refusals import Refusal, refuse_decode, refuse_dropout, refuse_gradient, refuse_heads, refuse_tensors
from .site import AttentionSite, IsCausal, Masked, describe_shapes

_SDPA_TARGETS = frozenset(
    {
        F.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention.default,
    }
)


def is_sdpa(node: Node) -> bool:
    """Tell whether a node is an attention call, by any of its names."""
    return node.op == "call_function" and node.target in _SDPA_TARGETS


def match_sdpa(node: Node, config: SparsePrefillConfig) -> AttentionSite | Skipped:
    """Check one attention call: return what the rewrite needs, or why it has to stay dense.

    Args:
        node: A node for which ``is_sdpa`` holds.
        config: How short a prompt stays dense.
    """
    call = inspect.signature(_sdpa).bind(*node.args, **node.kwargs)
    call.apply_defaults()
    arguments = call.arguments
    query, key, value = (example_of(arguments[name]) for name in ("query", "key", "value"))
    output = example_of(node)
    scores = IsCausal() if arguments["attn_mask"] is None else Masked(arguments["attn_mask"])

    # Cheap facts first; the lengths last, because they may add guards.
    refusal = (
        refuse_tensors(query, key, value, output)
        or _refuse_call(arguments, query, output)
        or refuse_heads(query, key, value, enable_gqa=bool(arguments["enable_gqa"]))
        or refuse_lengths(query.shape[-2], key.shape[-2], config, is_causal=isinstance(scores, IsCausal))
    )
    if refusal is not None:
        return Skipped(name_of(node), describe_shapes(query, key), *refusal)

    shared_key, shared_value = share_key_heads(Operand(arguments["key"], node), Operand(arguments["value"], node), node)
    scale = example_of(arguments["scale"])
    return AttentionSite(
        node=node,
        name=name_of(node),
        query=arguments["query"],
        key=shared_key.node,
        value=shared_value.node,
        scores=scores,
        # float() pins a symbolic scale, as dynamo does itself when it meets the call.
        scale=int(query.shape[-1]) ** -0.5 if scale is None else float(scale),
        dtype=output.dtype,
        shapes=describe_shapes(query, example_of(shared_key.node)),
    )


def _sdpa(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    *,
    scale: Any = None,
    enable_gqa: Any = False,
) -> None:
    """Carry the signature of scaled_dot_product_attention, which as a builtin has none to inspect."""


def _refuse_call(arguments: dict[str, Any], query: Tensor, output: Tensor) -> Refusal | None:
    if (refusal := refuse_decode(query)) is not None:
        return refusal
    # With a mask is_causal is False: torch takes only one of them.
    if arguments["attn_mask"] is None and not guard_or_false(example_of(arguments["is_causal"])):
        return SkipReason.NOT_CAUSAL, ""
    return refuse_dropout(example_of(arguments["dropout_p"])) or refuse_gradient(output)
