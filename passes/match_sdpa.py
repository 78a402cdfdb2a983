"""Find scaled_dot_product_attention in a dynamo graph and tell what can run sparse. Never mutates.

For example,

    out = scaled_dot_product_attention(q, k, v, is_causal=True)    ->  SdpaSite
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)    ->  Skipped(EXPLICIT_MASK)
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from flexprefill_compile.passes.prefill_shapes import Refusal, refuse_lengths
from flexprefill_compile.report import AttentionShapes, Skipped, SkipReason
from flexprefill_compile.torch_internals import FakeTensor, guard_or_false, statically_known_true

SDPA_TARGETS = frozenset(
    {
        F.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention.default,
    }
)
SUPPORTED_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
SUPPORTED_DEVICES = frozenset({"cpu", "cuda"})
SMALLEST_HEAD_DIM = 16


@dataclasses.dataclass(frozen=True)
class SdpaSite:
    """Everything the rewrite needs of one attention call, already checked.

    Attributes:
        node: The call.
        name: Where it stands in the model.
        query: The node of (B, H, S, D).
        key: The node of (B, Hkv, S, D).
        value: The node of (B, Hkv, S, Dv).
        scale: The factor on the scores.
        dtype: What the call returns; under autocast its inputs may differ.
        shapes: The sizes, for the report.
    """

    node: Node
    name: str
    query: Node
    key: Node
    value: Node
    scale: float
    dtype: torch.dtype
    shapes: AttentionShapes

    @property
    def signature(self) -> tuple[object, ...]:
        """What decides how inductor lowers the site: equal signatures succeed or fail alike."""
        return self.shapes, _format_shape(example_of(self.value)), self.dtype


def is_sdpa(node: Node) -> bool:
    """Tell whether a node is an attention call, by any of its names."""
    return node.op == "call_function" and node.target in SDPA_TARGETS


def match_sdpa(node: Node, min_length: int) -> SdpaSite | Skipped:
    """Check one attention call: return what the rewrite needs, or why it has to stay dense.

    Args:
        node: A node for which ``is_sdpa`` holds.
        min_length: Shorter prompts stay dense, in tokens.
    """
    call = inspect.signature(_sdpa).bind(*node.args, **node.kwargs)
    call.apply_defaults()
    arguments = call.arguments
    query, key, value = (example_of(arguments[name]) for name in ("query", "key", "value"))
    output = example_of(node)
    shapes = AttentionShapes(_format_shape(query), _format_shape(key), str(getattr(query, "dtype", "?"))[6:])

    # Cheap facts first; the lengths last, because they may add guards.
    refusal = (
        _refuse_tensors(query, key, value, output)
        or _refuse_call(arguments, query, output)
        or _refuse_heads(query, key, value, bool(arguments["enable_gqa"]))
        or refuse_lengths(query.shape[-2], key.shape[-2], min_length)
    )
    if refusal is not None:
        return Skipped(_name_of(node), shapes, *refusal)

    scale = example_of(arguments["scale"])
    return SdpaSite(
        node=node,
        name=_name_of(node),
        query=arguments["query"],
        key=arguments["key"],
        value=arguments["value"],
        # float() pins a symbolic scale, as dynamo does itself when it meets the call.
        scale=int(query.shape[-1]) ** -0.5 if scale is None else float(scale),
        dtype=output.dtype,
        shapes=shapes,
    )


def example_of(argument: Any) -> Any:
    """Return the fake tensor or symbolic number that a node stands for; a constant stands for itself."""
    if not isinstance(argument, Node):
        return argument
    return argument.meta.get("example_value", argument.meta.get("val"))


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


def _refuse_tensors(*tensors: Any) -> Refusal | None:
    for tensor in tensors:
        if type(tensor) is not FakeTensor:
            return SkipReason.TENSOR_SUBCLASS, type(tensor).__name__
        if tensor.device.type not in SUPPORTED_DEVICES:
            return SkipReason.DEVICE, str(tensor.device)
    output = tensors[-1]
    if output.dtype not in SUPPORTED_DTYPES:
        return SkipReason.DTYPE, str(output.dtype)
    return None


def _refuse_call(arguments: dict[str, Any], query: Tensor, output: Tensor) -> Refusal | None:
    if query.dim() > 2 and statically_known_true(query.shape[-2] == 1):
        return SkipReason.DECODE, ""
    if arguments["attn_mask"] is not None:
        return SkipReason.EXPLICIT_MASK, ""
    if not guard_or_false(example_of(arguments["is_causal"])):
        return SkipReason.NOT_CAUSAL, ""
    if not guard_or_false(example_of(arguments["dropout_p"]) == 0):
        return SkipReason.DROPOUT, f"dropout_p={arguments['dropout_p']}"
    if output.requires_grad:
        return SkipReason.GRADIENT, ""
    return None


def _refuse_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> Refusal | None:
    shapes = ", ".join(_format_shape(tensor) for tensor in (query, key, value))
    if not query.dim() == key.dim() == value.dim() == 4:
        return SkipReason.SHAPE, shapes
    if not guard_or_false(query.shape[0] == key.shape[0]) or not guard_or_false(key.shape[0] == value.shape[0]):
        return SkipReason.SHAPE, f"batches broadcast: {shapes}"
    # int() pins symbolic counts: they are constants of a model, and inductor takes FlexAttention's as such only.
    num_heads, num_kv_heads, num_value_heads = (int(tensor.shape[1]) for tensor in (query, key, value))
    shares_heads = num_kv_heads in {num_heads, 1} or (enable_gqa and num_heads % num_kv_heads == 0)
    if num_kv_heads != num_value_heads or not shares_heads:
        return SkipReason.SHAPE, shapes
    smallest = min(int(query.shape[-1]), int(value.shape[-1]))
    if smallest < SMALLEST_HEAD_DIM:
        return SkipReason.HEAD_DIM, f"{smallest} < {SMALLEST_HEAD_DIM}"
    return None


def _name_of(node: Node) -> str:
    """Return the path of the submodule that made the call, or the node's own name outside of any."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    path = list(stack.values())[-1][0]
    return path.removeprefix("L['self']").removeprefix("L['fn']").lstrip(".") or node.name


def _format_shape(tensor: Any) -> str:
    return "x".join(str(size) for size in getattr(tensor, "shape", ())) or "?"
