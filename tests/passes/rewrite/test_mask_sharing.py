"""Layers share the facts of one mask, and what it reads has the value of the time when it is built."""

from __future__ import annotations

import torch
from helpers.graphs import rewrite_graphs
from helpers.lifting.lifted_masks import (
    BATCH,
    CONFIG,
    CONFIG_EXACT,
    HEADS,
    LENGTH,
    PAD,
    causal,
    pad_of,
    positions,
)
from torch import Tensor
from torch.nn import functional as F


def test_layers_share_the_facts_of_one_mask() -> None:
    def layers(x: Tensor, pad: Tensor) -> Tensor:
        mask = causal(x) & pad_of(x, pad)
        for _ in range(3):
            x = F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        return x

    ((graph_module,), sites) = rewrite_graphs(layers, torch.randn(BATCH, HEADS, LENGTH, 16), PAD, config=CONFIG)
    assert [site.rewritten for site in sites] == [True] * 3
    selections = [n for n in graph_module.graph.nodes if n.target is torch.ops.flexprefill.select_masked_blocks.default]
    assert len({n.args[3:13] for n in selections}) == 1
    assert len(selections) == 3
    assert sum(name.startswith("flexprefill_mask") for name, _ in graph_module.named_children()) == 1


def test_a_capture_is_read_when_the_mask_is_built() -> None:
    """A cache that moves its position afterwards does not move the mask."""

    def call(x: Tensor, offset: Tensor) -> Tensor:
        mask = positions(x)[1] <= positions(x)[0] + offset
        offset.add_(100)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    x = torch.randn(BATCH, HEADS, LENGTH, 16)
    expected = call(x, torch.tensor(3))

    ((graph_module,), (site,)) = rewrite_graphs(call, x, torch.tensor(3), config=CONFIG_EXACT)
    assert site.rewritten
    torch.testing.assert_close(graph_module(x, torch.tensor(3))[0], expected)
