"""Match every form of attention at its central node: the call, or the softmax. Never mutates."""

from __future__ import annotations

from torch.fx import Node

from flexprefill_compile.report import Skipped, SkipReason
from flexprefill_compile.settings.config import SparsePrefillConfig
from flexprefill_compile.torch_internals import FUSED_ATTENTION

from ..graph.nodes import example_of, name_of
from .eager import is_softmax, match_eager
from .flex import is_flex_attention, match_flex
from .sdpa import is_sdpa, match_sdpa
from .site import AttentionSite, describe_shapes


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
    if node.op == "call_function" and node.target in FUSED_ATTENTION:
        query, key = (example_of(argument) for argument in node.args[:2])
        return Skipped(name_of(node), describe_shapes(query, key), SkipReason.FUSED)
    return None
