"""Describe attention that a model wrote out, or tell why it stays dense. Never mutates.

    weights = softmax(matmul(query, key.transpose(2, 3)) * scale + mask, dim=-1)
    out = matmul(weights, value)                                                  ->  scores Logits(...)

A softmax is attention's if its input is made of a product of batches of matrices and its result goes into another one:
not that of a router of experts, nor of sampling. Attention in a form that is not understood to the last operation is
Skipped.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from flexprefill_compile.config import SparsePrefillConfig
from flexprefill_compile.passes.attention_site import (
    AttentionSite,
    Logits,
    describe_shapes,
    example_of,
    name_of,
)
from flexprefill_compile.passes.check_site import (
    refuse_decode,
    refuse_dropout,
    refuse_gradient,
    refuse_heads,
    refuse_tensors,
)
from flexprefill_compile.passes.logits import LogitsTrace, feeds_product, holds_product, is_product, trace_logits
from flexprefill_compile.passes.operands import (
    Operand,
    is_edited,
    merges_heads,
    share_key_heads,
    shares_memory,
    split_heads,
    transpose_back,
    undo_upcast,
)
from flexprefill_compile.passes.operations import (
    CASTS,
    DROPOUT,
    SOFTMAX,
    VIEWS,
    argument,
    edited_inputs,
    first_input,
    live_users,
    operation,
    product_operands,
)
from flexprefill_compile.passes.prefill_shapes import Refusal, refuse_lengths
from flexprefill_compile.report import Skipped, SkipReason


class WeightsTrace(NamedTuple):
    """What becomes of attention weights.

    Attributes:
        products: Those of the weights with a value.
        steps: The softmax, then the casts, views and dropout of its result.
        others: What else uses any of these.
    """

    products: list[Node]
    steps: list[Node]
    others: list[Node]


class Parts(NamedTuple):
    """The nodes of an attention that is written out, as far as the form of it tells."""

    query: Operand
    key: Operand
    value: Operand
    logits: LogitsTrace
    weights: WeightsTrace

    @property
    def output(self) -> Node:
        """The product of the weights with the value."""
        return self.weights.products[0]


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
    if logits is None or not isinstance(example_of(logits), Tensor) or not _is_attention(logits, softmax):
        return None
    parts = _read_parts(softmax, logits)
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


def _is_attention(logits: Node, softmax: Node) -> bool:
    return feeds_product(softmax) and holds_product([logits])


def _read_parts(softmax: Node, logits: Node) -> Parts | str:
    """Take an attention apart, or return what about it is not understood."""
    trace, weights = trace_logits(logits), _follow_weights(softmax)
    if argument(softmax, 1, "dim") not in {-1, example_of(logits).dim() - 1}:
        return "softmax over another dimension than the last"
    if not weights.products:
        return "weights that go through more than casts, views and dropout"
    if len(trace.products) != 1 or holds_product(trace.others):
        return "logits of more than one product and elementwise operations"
    scores, output = trace.products[0], weights.products[0]
    first, second = product_operands(scores)
    operands = (
        split_heads(Operand(first, scores)),
        transpose_back(Operand(second, scores)),
        split_heads(Operand(product_operands(output)[1], output)),
    )
    query, key, value = operands
    if query is None or key is None or value is None:
        return "query, key or value not known to be (B, H, S, D)"
    return Parts(query, key, value, trace, weights)


def _follow_weights(softmax: Node) -> WeightsTrace:
    products, steps, others = [], [softmax], []
    for node in steps:  # which grows meanwhile
        for user in live_users(node):
            if is_product(user) and product_operands(user)[0] is node and product_operands(user)[1] is not node:
                products.append(user)
            elif operation(user) in CASTS | VIEWS | DROPOUT and first_input(user) is node:
                steps.append(user)
            else:
                others.append(user)
    return WeightsTrace(products, steps, others)


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
