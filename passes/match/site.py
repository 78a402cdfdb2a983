"""What every form of attention is described as: an ``AttentionSite``. The modules of each form make them.

form                                                               scores
scaled_dot_product_attention(q, k, v, is_causal=True)              IsCausal()
scaled_dot_product_attention(q, k, v, attn_mask=mask)              Masked(mask)
softmax(tanh(q @ k.mT * scale) + mask, dim=-1) @ v                 Logits(scores, logits, steps)
flex_attention(q, k, v, score_mod, block_mask)                     FlexMods(score_mod, mask_mod, ...)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from flexprefill_compile.report import AttentionShapes

from ..graph.nodes import example_of
from ..graph.operations import operation


@dataclasses.dataclass(frozen=True)
class IsCausal:
    """The scores times the scale, causal: query i sees keys 0 to i."""

    signature: ClassVar[tuple[object, ...]] = ("causal",)


@dataclasses.dataclass(frozen=True)
class Masked:
    """The scores times the scale, under a mask.

    Attributes:
        mask: The node of what broadcasts to (B, H, Sq, Skv): bool, True where a query sees a key, or a float to add.
    """

    mask: Node

    @property
    def signature(self) -> tuple[object, ...]:
        """What of it decides how inductor lowers the site."""
        mask = example_of(self.mask)
        return "masked", str(mask.dtype), describe_shape(mask)


@dataclasses.dataclass(frozen=True)
class Logits:
    """The scores under operations that the model wrote out, each on one element of the scores at a time.

    Their shapes are (B, H, Sq, Skv), or (B * H, Sq, Skv) where the model merges the two.

    Attributes:
        scores: The node of Q K^T. A baddbmm also adds to it: its value is beta * input + alpha * Q K^T.
        logits: The node that softmax takes, over its last dimension.
        steps: The nodes from ``scores``, which is the first, to ``logits``, which is the last (the two may be one),
            through which the scores go: elementwise operations, casts, and views that merge or part B and H. Their
            other inputs are masks and biases. None of these values is edited in place where anyone else sees it.
    """

    scores: Node
    logits: Node
    steps: tuple[Node, ...]

    @property
    def signature(self) -> tuple[object, ...]:
        """What of it decides how inductor lowers the site."""
        return "logits", *(operation(step) for step in self.steps)


@dataclasses.dataclass(frozen=True)
class FlexMods:
    """The scores times the scale, under the score_mod and in the blocks of a FlexAttention call.

    Attributes:
        score_mod: Takes score, batch, head, query index, key index, then the captures.
        mask_mod: Takes batch, head, query index, key index, then the captures.
        score_captures: Arguments of the call: nodes of tensors and symbolic numbers, or constants.
        mask_captures: Likewise.
        block_mask: The call's block-mask tuple as it stands: nodes and constants in the order of
            ``BlockMask.as_tuple()``, the last of them the node of the mask_mod. Only the blocks that it lists are
            computed, and in those that it lists as full the mask_mod does not run.
        kernel_options: The call's own, completed by FlexAttention.
    """

    score_mod: GraphModule
    mask_mod: GraphModule
    score_captures: tuple[Any, ...]
    mask_captures: tuple[Any, ...]
    block_mask: tuple[Any, ...]
    kernel_options: Mapping[str, Any]

    @property
    def signature(self) -> tuple[object, ...]:
        """What of it decides how inductor lowers the site."""
        return "flex", self.score_mod.code, self.mask_mod.code


Scores = IsCausal | Masked | Logits | FlexMods


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """Everything the rewrite needs of one attention, already checked.

    Attributes:
        node: The node whose value the rewrite replaces, (B, H, Sq, Dv); where a model merges B and H, (B * H, Sq, Dv).
        name: Where it stands in the model.
        query: The node of (B, H, Sq, D).
        key: The node of (B, Hkv, Skv, D), before any repetition for the query heads that share it.
        value: The node of (B, Hkv, Skv, Dv), likewise.
        scores: What happens between Q K^T and softmax.
        scale: The factor on the scores, or None where the logits hold it.
        dtype: What the attention returns; query, key and value may differ from it, under autocast or where they are
            cast on their way into the product.
        shapes: The sizes, for the report.
    """

    node: Node
    name: str
    query: Node
    key: Node
    value: Node
    scores: Scores
    scale: float | None
    dtype: torch.dtype
    shapes: AttentionShapes

    @property
    def signature(self) -> tuple[object, ...]:
        """What decides how inductor lowers the site: equal signatures succeed or fail alike."""
        return self.shapes, describe_shape(example_of(self.value)), self.dtype, *self.scores.signature


def describe_shape(tensor: Any) -> str:
    """Return a tensor's sizes as text: symbolic ones by their symbols, "?" for what is no tensor."""
    return "x".join(str(size) for size in getattr(tensor, "shape", ())) or "?"


def describe_shapes(query: Any, key: Any) -> AttentionShapes:
    """Return the sizes of an attention for the report, from the examples of its query and key."""
    return AttentionShapes(describe_shape(query), describe_shape(key), str(getattr(query, "dtype", "torch.?"))[6:])
