"""From an attention site to what FlexAttention and the estimator take: a mask_mod, a score_mod, and their properties.

IsCausal()            ->  no formula: query i sees keys 0 to i
Masked(mask)          ->  the formula of the mask                              (Lifter, split_mask)
Logits(scores, ...)   ->  the formula of all that happens to a score           (Lifter, split_logit)
FlexMods(...)         ->  the call's own functions                             (split_mask, split_logit)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from flexprefill_compile.report import SkipReason
from flexprefill_compile.settings.config import SparsePrefillConfig
from flexprefill_compile.torch_internals import statically_known_true

from ..graph.edits import edited_inputs, shares_memory
from ..graph.nodes import example_of
from ..graph.trace import TracedValue, bind_number, trace, trace_value
from ..match.refusals import Refusal
from ..match.site import AttentionSite, FlexMods, IsCausal, Logits, Masked
from .bounds import MaskBounds, find_bounds
from .elements import INDEX_NAMES, Capture, LiftedElement, NotLiftableError
from .lifter import Lifter
from .score_parts import ScoreParts, split_logit, split_mask
from .value_rules import VALUE_RULES
from .view_rules import VIEW_RULES


@dataclasses.dataclass(frozen=True)
class LiftedSite:
    """An attention site and what its scores go through.

    Attributes:
        site: What was matched.
        parts: What happens to its scores. Without a mask it is causal: query i sees keys 0 to i.
        bounds: What is known of the mask.
        traced: Where the captures of ``parts`` come from.
    """

    site: AttentionSite
    parts: ScoreParts
    bounds: MaskBounds
    traced: TracedValue

    @property
    def is_plain(self) -> bool:
        """Whether it is causal attention and nothing else, for a prompt and its own keys."""
        is_alone = self.bounds.is_plain and self.parts.bias is None and self.parts.softcap is None
        query_length, key_length = (example_of(x).shape[2] for x in (self.site.query, self.site.key))
        # What is_causal means was settled by the matcher, with a guard where it had to.
        return is_alone and (self.parts.mask is None or statically_known_true(query_length == key_length))


_RULES = VIEW_RULES | VALUE_RULES

_PLAIN = MaskBounds(is_causal=True, offset=None, is_packed=False, is_given=False, is_plain=True)
_NOTHING_TRACED = TracedValue(Graph(), (), (), {})


# By the node of a mask: layers that share one lift it once.
LiftedMasks = dict[Node, tuple[TracedValue, ScoreParts] | Refusal]


def lift_site(site: AttentionSite, config: SparsePrefillConfig, known: LiftedMasks) -> LiftedSite | Refusal:
    """Find what happens to the scores of an attention, or tell why it stays dense.

    Args:
        site: A match.
        config: Its ``max_mask_elements`` limits the masks that are read as they are given.
        known: The masks lifted before. The function adds this one.
    """
    if isinstance(site.scores, IsCausal):
        return LiftedSite(site, ScoreParts(None, None, _scale_of(site), None), _PLAIN, _NOTHING_TRACED)
    taken = _take_apart_once(site, config, known)
    if isinstance(taken[0], SkipReason):
        return taken
    traced, parts = taken
    if parts.mask is None:
        return SkipReason.NOT_CAUSAL, "no mask"
    bounds = find_bounds(parts.mask)
    if not bounds.is_causal and not bounds.is_given:
        return SkipReason.NOT_CAUSAL, "its mask lets queries see later keys"
    return LiftedSite(site, parts, bounds, traced)


def _take_apart_once(
    site: AttentionSite, config: SparsePrefillConfig, known: LiftedMasks
) -> tuple[TracedValue, ScoreParts] | Refusal:
    if not isinstance(site.scores, Masked):
        return _try_to_take_apart(site, config)
    if site.scores.mask not in known:
        known[site.scores.mask] = _try_to_take_apart(site, config)
    taken = known[site.scores.mask]
    if isinstance(taken[0], SkipReason):
        return taken
    return taken[0], dataclasses.replace(taken[1], scale=_scale_of(site))


def _try_to_take_apart(site: AttentionSite, config: SparsePrefillConfig) -> tuple[TracedValue, ScoreParts] | Refusal:
    try:
        return _take_apart(site, config)
    except NotLiftableError as error:
        return SkipReason.MASK_NOT_LIFTED, str(error)
    except _EditedError as error:
        return SkipReason.MASK_EDITED, str(error)
    except Exception as error:  # whatever tracing stumbles over, dense attention is right
        return SkipReason.MASK_NOT_LIFTED, f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _scale_of(site: AttentionSite) -> float:
    return 1.0 if site.scale is None else site.scale


def _take_apart(site: AttentionSite, config: SparsePrefillConfig) -> tuple[TracedValue, ScoreParts]:
    match site.scores:
        case Masked(mask=mask):
            traced = trace_value(mask)
            _check_edits(mask, traced, reader=site.node, exempt=())
            lifted = Lifter(traced, None, config.max_mask_elements, _RULES).lift()
            return traced, split_mask(lifted, example_of(mask).dtype, _scale_of(site))
        case Logits(scores=scores, logits=logits, steps=steps):
            traced = trace_value(logits, product=scores)
            _check_edits(logits, traced, reader=site.node, exempt=steps)
            lifted = Lifter(traced, int(example_of(site.query).shape[1]), config.max_mask_elements, _RULES).lift()
            parts = split_logit(lifted, example_of(logits).dtype)
            return traced, dataclasses.replace(parts, scale=parts.scale * _scale_of(site))
        case FlexMods() as mods:
            _check_block_size(mods, config.block_size)
            return _take_flex_apart(mods, site)
        case _:
            raise NotLiftableError(f"{type(site.scores).__name__} has no formula")


# Edits in place


class _EditedError(Exception):
    """Something that the mask is computed from is written into, where a walk along its ancestors can't see it."""


def _check_edits(value: Node, traced: TracedValue, reader: Node, exempt: tuple[Node, ...]) -> None:
    """Raise if a value is edited before it is read, or its ancestors between their own computation and the value's."""
    order = {node: number for number, node in enumerate(value.graph.nodes)}
    for writer in value.graph.nodes:
        if order[writer] > order[reader] or writer in exempt:
            continue
        endangered = (value,) if order[writer] > order[value] else traced.ancestors
        for edited in map(example_of, edited_inputs(writer)):
            for node in endangered:
                if order[node] < order[writer] and shares_memory(node, edited):
                    raise _EditedError(f"{writer.name} writes into it")


# FlexAttention's own functions


def _check_block_size(mods: FlexMods, block_size: int) -> None:
    own = tuple(mods.block_mask[-3:-1])
    if own != (block_size, block_size):
        raise NotLiftableError(f"its block mask has blocks of {own[0]} x {own[1]}, not {block_size} x {block_size}")


def _take_flex_apart(mods: FlexMods, site: AttentionSite) -> tuple[TracedValue, ScoreParts]:
    score_captures, mask_captures = (tuple(map(bind_number, c)) for c in (mods.score_captures, mods.mask_captures))
    captures = tuple(a for a in (*score_captures, *mask_captures) if isinstance(a, Node))
    graph = Graph()
    leaves = {node: graph.placeholder(f"leaf_{number}") for number, node in enumerate(dict.fromkeys(captures))}
    for node, leaf in leaves.items():
        leaf.meta["val"] = example_of(node)
    traced = TracedValue(graph, tuple(leaves), tuple(leaves), {})
    score = _lift_function(mods.score_mod, score_captures, leaves, site, takes_score=True)
    mask = _lift_function(mods.mask_mod, mask_captures, leaves, site, takes_score=False)
    parts = split_logit(score, torch.float32)
    if parts.mask is not None:
        raise NotLiftableError("the score_mod hides keys: make it a mask_mod")
    own_mask = split_mask(mask, torch.bool, 1.0).mask
    return traced, dataclasses.replace(parts, mask=own_mask, scale=parts.scale * _scale_of(site))


def _lift_function(
    function: GraphModule,
    captures: tuple[Any, ...],
    leaves: dict[Node, Node],
    site: AttentionSite,
    *,
    takes_score: bool,
) -> LiftedElement:
    """Trace a mask_mod or score_mod, which is a formula already, into ATen ops."""
    nodes = [capture for capture in captures if isinstance(capture, Node)]

    def call(score: Tensor, *indices_and_nodes: Any) -> Any:
        indices, values = indices_and_nodes[:4], iter(indices_and_nodes[4:])
        filled = (next(values) if isinstance(capture, Node) else capture for capture in captures)
        return function(*((score,) if takes_score else ()), *indices, *filled)

    query = example_of(site.query)
    with query.fake_mode:
        score = torch.empty((), dtype=torch.float32, device=query.device)
        indices = [torch.empty((), dtype=torch.int64, device=query.device) for _ in range(4)]
    traced = trace(site.query.graph, call, score, *indices, *map(example_of, nodes))
    graph = traced.graph
    placeholders = graph.find_nodes(op="placeholder")
    names = ("score", *INDEX_NAMES, *(f"capture_{number}" for number in range(1, len(nodes) + 1)))
    for placeholder, name in zip(placeholders, names, strict=True):
        placeholder._rename(name)
    bound = {p: Capture(leaves[n], (None,) * _dims(n)) for p, n in zip(placeholders[5:], nodes, strict=True)}
    element: Any = graph.output_node().args[0]
    graph.erase_node(graph.output_node())
    return LiftedElement(graph, element, bound)


def _dims(node: Node) -> int:
    example = example_of(node)
    return example.dim() if isinstance(example, Tensor) else 0
