"""What sequence parallelism can't do right, in one sentence: it is an error, because local attention would be wrong."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node

from flexprefill_compile.report import Skipped, SkipReason
from flexprefill_compile.settings.config import SparsePrefillConfig
from flexprefill_compile.settings.rank_groups import RankGroup
from flexprefill_compile.torch_internals import FUSED_ATTENTION, PassesThroughDynamo, guard_or_false

from ..graph.nodes import example_of, name_of
from ..graph.operations import live_users
from ..match.eager import is_softmax, match_eager
from ..match.flex import is_flex_attention
from ..match.refusals import refuse_decode
from ..match.site import describe_shape


class SequenceParallelError(PassesThroughDynamo, RuntimeError):
    """``sequence_parallel`` and something of the model that would come out wrong."""


def refuse(node: Node, reason: str) -> SequenceParallelError:
    """Return the error for an attention call."""
    return SequenceParallelError(f"sequence_parallel can't spread attention call {name_of(node)}: {reason}")


def check_form(node: Node) -> None:
    """Raise for attention in any other form than a call of scaled_dot_product_attention.

    Raises:
        SequenceParallelError: Says which form it has and what to do.
    """
    if is_flex_attention(node) and live_users(node):
        raise refuse(node, "it is a FlexAttention call, whose block mask knows its own stretch only; use SDPA")
    if node.op == "call_function" and node.target in FUSED_ATTENTION:
        raise refuse(node, "projections and attention are one call; use scaled_dot_product_attention")
    if is_softmax(node) and _is_prefill(node):
        raise refuse(
            node, "it is written out; use scaled_dot_product_attention (Hugging Face: attn_implementation='sdpa')"
        )


def check_call(node: Node, arguments: dict[str, Any], group: RankGroup) -> None:
    """Raise unless an SDPA call is causal prefill whose heads the ranks can share.

    Args:
        node: The call.
        arguments: By name, with defaults.
        group: The ranks.

    Raises:
        SequenceParallelError: Says what it is instead.
    """
    examples = [example_of(arguments[name]) for name in ("query", "key", "value")]
    query, key, value = examples
    shapes = ", ".join(describe_shape(x) for x in examples)
    if not all(isinstance(x, Tensor) and x.dim() == 4 for x in examples):
        raise refuse(node, f"its inputs aren't (B, H, S, D), but {shapes}")
    if example_of(node).requires_grad:
        raise refuse(node, "it is under autograd; use torch.no_grad()")
    if not guard_or_false(example_of(arguments["dropout_p"]) == 0):
        raise refuse(node, "it has dropout")
    if arguments["attn_mask"] is None and not guard_or_false(example_of(arguments["is_causal"])):
        raise refuse(node, "it isn't causal")
    num_heads, num_kv_heads = int(query.shape[1]), int(key.shape[1])
    if num_heads % num_kv_heads or int(value.shape[1]) != num_kv_heads:
        raise refuse(node, f"query heads aren't a multiple of key heads: {shapes}")
    if num_heads % group.size:
        raise refuse(node, f"its {num_heads} query heads can't be shared evenly by {group.size} ranks")
    if guard_or_false(example_of(arguments["is_causal"])) and not guard_or_false(query.shape[2] == key.shape[2]):
        raise refuse(node, "is_causal counts its queries from the first key, which a later chunk's don't start at")


def is_decode(arguments: dict[str, Any]) -> bool:
    """Tell whether an SDPA call is a decode step, whose one token every rank has."""
    query = example_of(arguments["query"])
    return isinstance(query, Tensor) and refuse_decode(query) is not None


def _is_prefill(softmax: Node) -> bool:
    """Tell whether a softmax is that of attention, and not of one query."""
    found = match_eager(softmax, SparsePrefillConfig(min_length=1))
    return found is not None and not (isinstance(found, Skipped) and found.reason is SkipReason.DECODE)
