"""Describe attention that a model wrote out, or tell why it stays dense. Never mutates.

    weights = softmax(matmul(query, key.transpose(2, 3)) * scale + mask, dim=-1)
    out = matmul(weights, value)                                                  ->  scores Logits(...)

A softmax is attention's if its input is made of a product of batches of matrices and its result goes into another one:
not that of a router of experts, nor of sampling. Attention in a form that is not understood to the last operation is
Skipped.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from flexprefill_compile.report import Skipped, SkipReason
from flexprefill_compile.settings.config import SparsePrefillConfig

from ..graph.edits import edited_inputs, shares_memory
from ..graph.nodes import argument, example_of, first_input, name_of
from ..graph.operations import DROPOUT, SOFTMAX, operation
from .eager_parts import Parts, WeightsTrace, read_parts
from .logits import (
    LogitsTrace,
    feeds_product,
    holds_product,
    undo_row_shift,
)
from .operands import is_edited, merges_heads, share_key_heads, undo_upcast
from .prefill_lengths import refuse_lengths
from .refusals import Refusal, refuse_decode, refuse_dropout, refuse_gradient, refuse_heads, refuse_tensors
from .site import AttentionSite, Logits, describe_shapes


def is_softmax(node: Node) -> bool:
    """Tell whether a node is a softmax, by any of its names."""
    return operation(node) in SOFTMAX


def match_eager(softmax: Node, config: SparsePrefillConfig) -> AttentionSite | Skipped | None:
    """Check the attention around a softmax: return what the rewrite needs, why it stays dense, or None if it is none.

    Args:
        softmax: A node for which ``is_softmax`` holds.
        config: How short a prompt stays dense.
    """
    logits = first_input(softmax)
    if logits is None or not isinstance(example_of(logits), Tensor):
        return None
    if not (feeds_product(softmax) and holds_product([logits])):
        return None
    parts = read_parts(softmax, undo_row_shift(logits))
    if isinstance(parts, str):
        reason, detail = refuse_decode(example_of(logits)) or (SkipReason.UNRECOGNISED, parts)
        return Skipped(name_of(softmax), describe_shapes(None, None), reason, detail)

    query, key, value, output = (example_of(x) for x in (*(part.node for part in parts[:3]), parts.output))
    refusal = (
        refuse_tensors(query, key, value, output)
        or refuse_decode(query)
        or _refuse_no_mask(parts.logits)
        or _refuse_weights(parts.weights)
        or refuse_gradient(output)
        or refuse_heads(query, key, value, enable_gqa=False)
        or _refuse_shapes(parts)
        or _refuse_edits(parts)
        or _refuse_precision(parts)
        or refuse_lengths(query.shape[-2], key.shape[-2], config, is_causal=False)
    )
    if refusal is not None:
        return Skipped(name_of(softmax), describe_shapes(query, key), *refusal)
    return _describe(parts)


def _describe(parts: Parts) -> AttentionSite:
    query = undo_upcast(parts.query).node
    key, value = (undo_upcast(part).node for part in share_key_heads(parts.key, parts.value, parts.output))
    steps = parts.logits.steps
    return AttentionSite(
        node=parts.output,
        name=name_of(parts.output),
        query=query,
        key=key,
        value=value,
        scores=Logits(scores=steps[0], logits=steps[-1], steps=tuple(steps)),
        scale=None,
        dtype=example_of(parts.output).dtype,
        shapes=describe_shapes(example_of(query), example_of(key)),
    )


def _refuse_no_mask(logits: LogitsTrace) -> Refusal | None:
    """Refuse logits into which nothing but scalars enters beside the scores: what masks has positions."""
    has_positions = any(getattr(example_of(other), "shape", ()) for other in logits.others)
    return None if has_positions else (SkipReason.NOT_CAUSAL, "")


def _refuse_weights(weights: WeightsTrace) -> Refusal | None:
    if weights.others or len(weights.products) > 1 or len(weights.steps) != len(set(weights.steps)):
        return SkipReason.WEIGHTS_USED, ""
    for step in weights.steps:
        if operation(step) in DROPOUT and argument(step, 2, "training", "train") is not False:
            probability = argument(step, 1, "p")
            refusal = refuse_dropout(0.5 if probability is None else example_of(probability))
            if refusal is not None:
                return refusal
    return None


def _refuse_shapes(parts: Parts) -> Refusal | None:
    """Refuse a step of another shape than (B, H, Sq, Skv), B and H apart or merged: one that broadcasts or regroups."""
    batch, num_heads, query_length, _ = parts.query.shape
    rows = (batch, num_heads, query_length)
    steps = [(step, parts.key.shape[-2]) for step in (*parts.logits.steps, *parts.weights.steps)]
    for node, width in (*steps, (parts.output, parts.value.shape[-1])):
        if not merges_heads((*rows, width), example_of(node).shape):
            return SkipReason.UNRECOGNISED, f"{node.name} is not (B, H, S, S)"
    return None


def _refuse_edits(parts: Parts) -> Refusal | None:
    """Refuse values that are edited in place, but for a step that edits its predecessor, which nobody else reads."""
    steps = [*parts.logits.steps, *parts.weights.steps]
    node = steps[0].next
    while node is not parts.output:
        for edited in edited_inputs(node):
            seen = [step for step in steps if shares_memory(step, example_of(edited))]
            is_private = node in steps and edited in steps and all(len(step.users) <= 1 for step in seen)
            if seen and not is_private:
                return SkipReason.UNRECOGNISED, f"{edited.name} is edited in place"
        node = node.next
    for operand in parts[:3]:
        if is_edited(operand, parts.output):
            return SkipReason.UNRECOGNISED, f"{operand.node.name} is edited in place"
    return None


def _refuse_precision(parts: Parts) -> Refusal | None:
    """Refuse scores in a wider dtype than the output's, of queries and keys that are themselves wider."""
    dtype = example_of(parts.output).dtype

    def is_wider(node: Node) -> bool:
        return bool(torch.promote_types(example_of(node).dtype, dtype) != dtype)

    scores = parts.logits.steps[0]
    if is_wider(scores) and any(is_wider(undo_upcast(operand).node) for operand in (parts.query, parts.key)):
        return SkipReason.UNRECOGNISED, f"scores in {example_of(scores).dtype}, result in {dtype}"
    return None
