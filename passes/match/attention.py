"""Match every form of attention at its central node: the call, or the softmax. Never mutates."""

from __future__ import annotations

import re

from torch.fx import Node

from flexprefill_compile.report import Skipped, SkipReason
from flexprefill_compile.settings.config import SparsePrefillConfig
from flexprefill_compile.torch_internals import FUSED_ATTENTION, OpOverload, OpOverloadPacket

from ..graph.nodes import example_of, name_of
from .eager import is_softmax, match_eager
from .flex import is_flex_attention, match_flex
from .sdpa import is_sdpa, match_sdpa
from .site import AttentionSite, describe_shapes

# Operations that stand for one kernel of attention, torch's and flash-attn's; not their derivatives.
_KERNEL = re.compile(
    r"(_scaled_dot_product_|flash_attn|varlen_attn|_flash_attention|_efficient_attention)(?!.*backward)"
)


def match_attention(node: Node, config: SparsePrefillConfig) -> AttentionSite | Skipped | None:
    """Describe the attention that a node stands for: a call, or a softmax that is written out.

    Args:
        node: Any node of a dynamo graph. Each attention is found at one node only, which need not be the site's.
        config: How short a prompt stays dense.

    Returns:
        What the rewrite needs, why the attention stays as it is, or None for what is no attention.
    """
    if is_sdpa(node):
        return match_sdpa(node, config)
    if is_softmax(node):
        return match_eager(node, config)
    if is_flex_attention(node):
        return match_flex(node, config)
    reason = _refuse_call(node)
    if reason is None:
        return None
    query, key = (example_of(argument) for argument in (*node.args, None, None)[:2])
    return Skipped(name_of(node), describe_shapes(query, key), reason)


def _refuse_call(node: Node) -> SkipReason | None:
    """Return why an attention in a call of another name stays dense, None for what is no attention."""
    if node.op != "call_function":
        return None
    if node.target in FUSED_ATTENTION:
        return SkipReason.FUSED
    is_kernel = isinstance(node.target, OpOverload | OpOverloadPacket) and _KERNEL.search(str(node.target)) is not None
    return SkipReason.KERNEL_CALLED if is_kernel else None
