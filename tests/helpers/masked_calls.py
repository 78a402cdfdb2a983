"""Configs, queries and keys for tests of selection under a mask."""

from __future__ import annotations

from hypothesis import strategies as st
from torch import Tensor

from flexprefill_compile.block_masks.estimators.flexprefill.masked_representative import (
    ScoreRule,
)
from flexprefill_compile.block_masks.masked_prefill import select_masked_prefill_blocks
from flexprefill_compile.block_masks.masks.facts import MaskFacts
from flexprefill_compile.settings.config import SparsePrefillConfig
from helpers.inputs import random_qk, structured_qk

BLOCK = 16
SCALE = 0.2
RULE = ScoreRule(SCALE)
seeds = st.integers(0, 2**32)


@st.composite
def configs(draw: st.DrawFn, taus: tuple[float, ...] = (0.0, 0.1, 1.0)) -> SparsePrefillConfig:
    min_budget = draw(st.sampled_from([0, 0, 32, 60]))
    return SparsePrefillConfig(
        gamma=draw(st.floats(0.51, 0.99)),
        tau=draw(st.sampled_from(taus)),
        min_budget=min_budget,
        max_budget=draw(st.none() | st.integers(max(1, min_budget), 120)),
        block_size=BLOCK,
    )


def draw_qk(seed: int, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Return structured or random inputs, grouped or not; seeds take turns."""
    heads, kv_heads = [(5, 1), (4, 2), (3, 3)][seed % 3]
    if seed % 2:
        return random_qk(seed, batch, heads, kv_heads, length, 32, spread=2)
    query, key = structured_qk(seed, batch, heads, kv_heads, length, 32, block_size=BLOCK)
    query[:, ::2] *= 0.1  # query-aware
    return query, key


def select(query: Tensor, key: Tensor, facts: MaskFacts, config: SparsePrefillConfig) -> Tensor:
    return select_masked_prefill_blocks(query, key, None, facts, RULE, config)
