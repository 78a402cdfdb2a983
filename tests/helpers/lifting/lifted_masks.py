"""Masks as models compute them, and what they are lifted to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F

from flexprefill_compile.passes.lift.lifted_site import LiftedSite
from flexprefill_compile.passes.sparse_prefill import ConfiguredSite, Layers, find_attention
from flexprefill_compile.settings.config import SparsePrefillConfig

from .graphs import inspect_graphs

BATCH, HEADS, LENGTH = 2, 4, 48
CONFIG_EXACT = SparsePrefillConfig(gamma=1.0, block_size=16, min_budget=0, min_length=16)
CONFIG = SparsePrefillConfig(block_size=16, min_budget=0, min_length=16, max_mask_elements=100_000)
Make = Callable[..., Tensor]


def positions(x: Tensor) -> tuple[Tensor, Tensor]:
    index = torch.arange(x.shape[2], device=x.device)
    return index[None, None, :, None], index[None, None, None, :]


def causal(x: Tensor) -> Tensor:
    query, key = positions(x)
    return key <= query


def pad_of(x: Tensor, pad: Tensor) -> Tensor:
    batch = torch.arange(x.shape[0])[:, None, None, None]
    return pad.to(torch.bool)[batch, positions(x)[1]]


def same_sequence(x: Tensor, position_ids: Tensor) -> Tensor:
    ids = (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    batch = torch.arange(x.shape[0])[:, None, None, None]
    query, key = positions(x)
    return ids[batch, query] == ids[batch, key]


def square(x: Tensor) -> Tensor:
    return torch.ones(x.shape[2], x.shape[2])


def additive(mask: Tensor, lowest: float = float("-inf")) -> Tensor:
    return torch.where(mask, 0.0, lowest)


def distance(x: Tensor) -> Tensor:
    query, key = positions(x)
    return key - query


PAD = torch.ones(BATCH, LENGTH, dtype=torch.long)
PAD[0, :10] = 0
PAD[1, 30:] = 0
IDS = torch.cat([torch.arange(20), torch.arange(28)]).expand(BATCH, -1)
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


MASKS: dict[str, tuple[Make, tuple[Tensor, ...]]] = {
    "causal": (causal, ()),
    "expanded": (lambda x: causal(x).expand(x.shape[0], 1, -1, -1), ()),
    "padded": (lambda x, pad: causal(x) & pad_of(x, pad), (PAD,)),
    "window": (lambda x: causal(x) & (distance(x) > -8), ()),
    "window and padding": (lambda x, pad: causal(x) & (distance(x) > -8) & pad_of(x, pad), (PAD,)),
    "packed": (lambda x, ids: causal(x) & same_sequence(x, ids), (IDS,)),
    "by position_ids": (lambda x, ids: ids[:, None, None, :] <= ids[:, None, :, None], (IDS.clone(),)),
    "chunked": (lambda x: causal(x) & (positions(x)[0] // 16 == positions(x)[1] // 16), ()),
    "tril": (lambda x: square(x).tril() == 1, ()),
    "tril of bools": (lambda x: square(x).bool().tril(), ()),
    "transposed triu": (lambda x: square(x).bool().triu().mT, ()),
    "triu of -inf": (lambda x: torch.full((x.shape[2], x.shape[2]), float("-inf")).triu(1), ()),
    "masked_fill": (lambda x: torch.zeros(x.shape[2:3] * 2).masked_fill(square(x).triu(1).bool(), float("-inf")), ()),
    "the lowest number": (lambda x: additive(causal(x), torch.finfo(x.dtype).min), ()),
    "one minus the mask": (lambda x: (1.0 - causal(x).to(x.dtype)) * torch.finfo(x.dtype).min, ()),
    "a tensor constant": (lambda x: torch.where(causal(x), torch.tensor(0.0), torch.finfo(x.dtype).min), ()),
    "a slice of a larger one": (lambda x: torch.ones(64, 64).tril().bool()[None, None, : x.shape[2], : x.shape[2]], ()),
    "a slice of a buffer": (
        lambda x, b: b[:, :, : x.shape[2], : x.shape[2]],
        (torch.ones(1, 1, 64, 64).tril().bool(),),
    ),
    "given": (lambda x, mask: mask, (torch.rand(BATCH, 1, LENGTH, LENGTH) > 0.5,)),
    "given, additive": (lambda x, mask: mask, (additive(torch.rand(BATCH, HEADS, LENGTH, LENGTH) > 0.5),)),
    "joined": (lambda x, pad: causal(x) & torch.cat([pad[:, :4] > -1, pad[:, 4:] > 0], 1)[:, None, None], (PAD,)),
    "ALiBi": (lambda x, slopes: additive(causal(x)) + slopes[:, None, None] * distance(x), (SLOPES,)),
    "relative positions": (
        lambda x, table: additive(causal(x)) + table[(-distance(x)[0, 0]).clamp(0, 7)].permute(2, 0, 1),
        (torch.randn(8, HEADS),),
    ),
    "offset in a tensor": (lambda x, offset: positions(x)[1] <= positions(x)[0] + offset, (torch.tensor(5),)),
}


def attend(make: Make) -> Callable[..., Tensor]:
    def call(x: Tensor, *inputs: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=make(x, *inputs))

    return call


def lift(make: Make, *inputs: Tensor, dynamic: bool) -> list[tuple[GraphModule, LiftedSite | Any]]:
    """Return each dynamo graph of a masked attention, and what the mask was lifted to."""

    def find(graph_module: GraphModule) -> tuple[GraphModule, LiftedSite | Any]:
        found = (find_attention(node, CONFIG, {}, Layers(CONFIG)) for node in graph_module.graph.nodes)
        (site,) = [x for x in found if x is not None]
        return graph_module, site.lifted if isinstance(site, ConfiguredSite) else site

    x = torch.randn(BATCH, HEADS, LENGTH, 16)
    return inspect_graphs(find, attend(make), x, *inputs, dynamic=dynamic)
