"""Masks for tests, as FlexAttention's mask_mod, with their facts found from the whole mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from flexprefill_compile.block_masks.estimators.flexprefill.masked_representative import ScoreRule
from flexprefill_compile.block_masks.layout import AttentionSizes
from flexprefill_compile.block_masks.masked_prefill import select_masked_prefill_blocks
from flexprefill_compile.block_masks.masks.facts import MaskFacts, describe_mask
from flexprefill_compile.block_masks.masks.intervals import BlockBounds
from flexprefill_compile.settings.config import SparsePrefillConfig
from helpers.inputs import paper_config, random_qk, structured_qk

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Call = tuple[MaskMod, AttentionSizes, int, bool]  # a mask, the sizes, the offset, whether it is packed


def causal(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
    return query_index >= key_index


def everything(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
    return (query_index >= 0) & (key_index >= 0)


def padded(starts: list[int], stops: list[int], mask_mod: MaskMod = causal) -> MaskMod:
    """Return a mask that hides the keys before ``starts`` and from ``stops`` on, by row of the batch."""
    first, last = torch.tensor(starts), torch.tensor(stops)

    def mask(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        is_token = (key_index >= first[batch]) & (key_index < last[batch])
        return mask_mod(batch, head, query_index, key_index) & is_token

    return mask


def packed(lengths: list[list[int]], mask_mod: MaskMod = causal) -> MaskMod:
    """Return a mask of sequences of these lengths, side by side in each row of the batch."""
    ids = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])

    def mask(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        return mask_mod(batch, head, query_index, key_index) & (ids[batch, query_index] == ids[batch, key_index])

    return mask


def window(width: int) -> MaskMod:
    def mask(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        return (query_index >= key_index) & (query_index - key_index < width)

    return mask


def chunk(offset: int, mask_mod: MaskMod = causal) -> MaskMod:
    """Return the mask of queries that stand ``offset`` keys further."""

    def mask(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        return mask_mod(batch, head, query_index + offset, key_index)

    return mask


def materialise(mask_mod: MaskMod, sizes: AttentionSizes) -> Tensor:
    """Return the whole mask, (B, H, Q, K)."""
    batch, heads, query_length, key_length = sizes
    visible = mask_mod(
        torch.arange(batch).view(-1, 1, 1, 1),
        torch.arange(heads).view(-1, 1, 1),
        torch.arange(query_length).view(-1, 1),
        torch.arange(key_length),
    )
    return visible.expand(*sizes)


def classify(mask: Tensor, block_size: int) -> BlockBounds:
    """Return which blocks of a mask (B, H, Q, K) are whole and which are not empty."""

    def blocks(fill: bool) -> Tensor:
        missing_keys, missing_queries = -mask.shape[-1] % block_size, -mask.shape[-2] % block_size
        filled = torch.nn.functional.pad(mask, (0, missing_keys, 0, missing_queries), value=fill)
        return filled.unflatten(-1, (-1, block_size)).unflatten(-3, (-1, block_size)).transpose(-3, -2).flatten(-2)

    return BlockBounds(certain=blocks(True).all(-1), possible=blocks(False).any(-1))


def find_facts(
    mask_mod: MaskMod, sizes: AttentionSizes, block_size: int, *, offset: int | Tensor = 0, is_packed: bool = False
) -> MaskFacts:
    """Return the facts of a mask that depends on neither batch nor head where ``sizes`` has 1 of them."""
    bounds = classify(materialise(mask_mod, sizes), block_size)
    return describe_mask(mask_mod, (), sizes, bounds, offset, is_packed, block_size)


def expand_blocks(selected: Tensor, sizes: AttentionSizes, block_size: int) -> Tensor:
    """Return which pairs of tokens the selected blocks hold, (B, H, Q, K)."""
    tokens = selected.repeat_interleave(block_size, -2).repeat_interleave(block_size, -1)
    return tokens[..., : sizes.query_length, : sizes.key_length]


def count_tokens(sequences: list[list[int]], block_size: int) -> list[list[int]]:
    """Return of each sequence the tokens in its own blocks: those whose last token is of that sequence."""
    owner = {key // block_size: number for number, sequence in enumerate(sequences) for key in sequence}
    return [
        [key for key in sequence if owner[key // block_size] == number] for number, sequence in enumerate(sequences)
    ]


def list_sequences(mask: Tensor, offset: int, is_packed: bool) -> list[list[list[int]]]:
    """Return the valid keys of each sequence of each row of the batch, from the whole mask (B, 1, Q, K)."""
    last_query = mask.shape[-2] - 1
    by_row = []
    for visible in mask[:, 0].tolist():
        sequences: list[list[int]] = [] if is_packed else [[]]
        for key in range(mask.shape[-1]):
            own = visible[min(max(key - offset, 0), last_query)]
            if own[key] and is_packed and (key == 0 or not own[key - 1]):
                sequences.append([])
            if own[key]:
                sequences[-1].append(key)
        by_row.append(sequences)
    return by_row


def list_representatives(sequence: list[int], query_length: int, offset: int, block_size: int) -> list[int]:
    """Return the valid rows among the last block_size rows of a sequence."""
    rows = [key - offset for key in sequence if 0 <= key - offset < query_length]
    return [row for row in rows if row > rows[-1] - block_size]


@st.composite
def packings(draw: st.DrawFn, multiple: int) -> list[list[int]]:
    """Return the lengths of sequences in rows of equal length, all but the last of each row multiples."""
    rows = draw(st.lists(st.lists(st.integers(1, 100 // multiple), max_size=4), min_size=1, max_size=2))
    rows = [[multiple * length for length in row] for row in rows]
    total = max(map(sum, rows)) + draw(st.integers(1, 90))
    return [[*row, total - sum(row)] for row in rows]


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Return a mask of any kind with its sizes, its offset and whether it is packed."""
    length = draw(st.integers(1, 170))
    inner = draw(st.sampled_from([causal, window(1), window(37), window(64)]))
    kind = draw(st.sampled_from(["padded", "packed", "chunk", "plain", "both ways"]))
    if kind == "padded":
        rows = [sorted(draw(st.tuples(st.integers(0, length), st.integers(0, length)))) for _ in range(2)]
        mask = padded([start for start, _ in rows], [stop for _, stop in rows], inner)
        return mask, AttentionSizes(2, 1, length, length), 0, draw(st.booleans())
    if kind == "packed":
        lengths = draw(packings(1))
        total = sum(lengths[0])
        return packed(lengths, inner), AttentionSizes(len(lengths), 1, total, total), 0, True
    if kind == "chunk":
        offset, unused = draw(st.integers(0, 100)), draw(st.integers(0, 40))
        sizes = AttentionSizes(1, 1, length, offset + length + unused)
        return chunk(offset, inner), sizes, offset, False
    if kind == "both ways":
        lengths = draw(packings(1))
        total = sum(lengths[0])
        mask = packed(lengths, everything)
        return mask, AttentionSizes(len(lengths), 1, total, total), 0, True
    return inner, AttentionSizes(1, 1, length, length), 0, False


# Configs, queries and keys for tests of selection under a mask.
BLOCK = 16
SCALE = 0.2
RULE = ScoreRule(SCALE)
seeds = st.integers(0, 2**32)


@st.composite
def configs(draw: st.DrawFn, taus: tuple[float, ...] = (0.0, 0.1, 1.0)) -> SparsePrefillConfig:
    min_budget = draw(st.sampled_from([0, 0, 32, 60]))
    return paper_config(
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
