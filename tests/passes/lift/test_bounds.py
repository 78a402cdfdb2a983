"""The formula of a mask proves whether it is causal, packed, given or plain, and where its queries stand."""

from __future__ import annotations

import pytest
import torch
from helpers.graphs import rewrite_graphs
from helpers.lifting.lifted_masks import (
    CONFIG_EXACT,
    LENGTH,
    MASKS,
    lift,
)
from torch import Tensor
from torch.nn import functional as F


@pytest.mark.parametrize(
    ("name", "is_packed", "is_given", "is_plain"),
    [
        ("causal", False, False, True),
        ("tril", False, False, True),
        ("transposed triu", False, False, True),
        ("one minus the mask", False, False, True),
        ("padded", False, False, False),
        ("packed", True, False, False),
        ("chunked", True, False, False),
        ("by position_ids", False, False, False),
        ("given", False, True, False),
    ],
)
def test_what_the_formula_of_a_mask_proves(name: str, is_packed: bool, is_given: bool, is_plain: bool) -> None:
    make, inputs = MASKS[name]
    ((_, lifted),) = lift(make, *inputs, dynamic=True)
    bounds = lifted.bounds
    assert (bounds.is_packed, bounds.is_given, bounds.is_plain) == (is_packed, is_given, is_plain)
    assert bounds.is_causal or bounds.is_given


def test_the_offset_of_a_chunk_is_read_from_its_mask() -> None:
    make, inputs = MASKS["offset in a tensor"]
    ((_, lifted),) = lift(make, *inputs, dynamic=False)
    assert str(lifted.bounds.offset) == "capture_1"
    assert lifted.bounds.compute_offset(lifted.parts.mask, inputs, None) == 5


def test_a_causal_mask_over_more_keys_than_queries_is_not_taken_for_a_prompt() -> None:
    """A cache that is larger than its contents: top-left-aligned causal, which prefill never uses."""

    def call(q: Tensor, k: Tensor) -> Tensor:
        mask = torch.arange(q.shape[2])[:, None] >= torch.arange(k.shape[2])
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask)

    q, k = torch.randn(1, 4, LENGTH, 16), torch.randn(1, 4, LENGTH + 40, 16)
    ((graph_module,), (site,)) = rewrite_graphs(call, q, k, config=CONFIG_EXACT)
    assert site.rewritten
    called = [node.target for node in graph_module.graph.nodes]
    assert torch.ops.flexprefill.select_masked_blocks.default in called
    torch.testing.assert_close(graph_module(q, k)[0], call(q, k))
