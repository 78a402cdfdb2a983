"""What ranks are refused, as the text of the error: functions for ``RankPool.run``, on CPU tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from flexprefill_compile.backend import FlexPrefillBackend

from ..models import TwoLayers
from .prefills import OPTIONS


class LocalPositions(nn.Module):
    """Learned positions that the model counts itself, from 0 on every rank."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.layer = TwoLayers()
        self.register_buffer("table", torch.randn(1000, 64))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if self.source == "arange":
            return self.layer(x + self.table[torch.arange(length)])  # type: ignore[no-any-return]
        if self.source == "slice":
            return self.layer(x + self.table[:length])  # type: ignore[no-any-return]
        return self.layer(x.cumsum(1))  # type: ignore[no-any-return]


def attend_under(make_mask: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def attend(x: Tensor) -> Tensor:
        query = x.unflatten(-1, (4, 16)).transpose(1, 2)
        return F.scaled_dot_product_attention(query, query, query, attn_mask=make_mask(x))

    return attend


def attend_written_out(x: Tensor) -> Tensor:
    query = x.unflatten(-1, (4, 16)).transpose(1, 2)
    scores = query @ query.mT + torch.ones(x.shape[1], x.shape[1]).tril().log()
    return scores.softmax(-1) @ query


def attend_both_ways(x: Tensor) -> Tensor:
    query = x.unflatten(-1, (4, 16)).transpose(1, 2)
    return F.scaled_dot_product_attention(query, query, query)


def attend_with_heads(x: Tensor) -> Tensor:
    query = x[..., :48].unflatten(-1, (3, 16)).transpose(1, 2)
    return F.scaled_dot_product_attention(query, query, query, is_causal=True)


def lengthwise_window(x: Tensor) -> Tensor:
    position = torch.arange(x.shape[1])
    distance = position[:, None] - position
    return (distance >= 0) & (distance * 2 < x.shape[1])


def attend_after(past: Tensor, *, is_causal: bool = False) -> Callable[[Tensor], Tensor]:
    """Return attention over keys of earlier chunks, (1, 4, P, 16), and the input's own."""

    def attend(x: Tensor) -> Tensor:
        query = x.unflatten(-1, (4, 16)).transpose(1, 2)
        key = torch.cat((past, query), 2)
        position = torch.arange(x.shape[1])[:, None] + past.shape[2]
        mask = None if is_causal else position >= torch.arange(key.shape[2])
        return F.scaled_dot_product_attention(query, key, key, attn_mask=mask, is_causal=is_causal)

    return attend


def attend_to_copies(x: Tensor) -> Tensor:
    query = x.unflatten(-1, (4, 16)).transpose(1, 2)
    key = torch.cat((query.sin(), query), 2)
    mask = torch.arange(x.shape[1])[:, None] + x.shape[1] >= torch.arange(key.shape[2])
    return F.scaled_dot_product_attention(query, key, key, attn_mask=mask)


@torch.compiler.nested_compile_region
def attend(x: Tensor) -> Tensor:
    query = x.unflatten(-1, (4, 16)).transpose(1, 2)
    return F.scaled_dot_product_attention(query, query, query, is_causal=True)


def attend_in_a_region(x: Tensor) -> Tensor:
    return attend(x) + attend(x.sin())  # dynamo inlines a region that runs once


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "arange": LocalPositions("arange"),
    "getitem": LocalPositions("slice"),
    "cumsum": LocalPositions("cumsum"),
    "written out": attend_written_out,
    "isn't causal": attend_both_ways,
    "3 query heads": attend_with_heads,
    "may be the length of the stretch": attend_under(lengthwise_window),
    "it is in a region of its own": attend_in_a_region,
    "200 queries after as many keys of earlier chunks": attend_after(torch.zeros(1, 4, 200, 16)),
    "is_causal counts its queries from the first key": attend_after(torch.zeros(1, 4, 72, 16), is_causal=True),
    "200 queries and 400 keys, not those of a DynamicCache": attend_to_copies,
}


def refuse_model(name: str) -> str:
    return _message(WRONG[name], torch.randn(1, 200, 64), {"sequence_parallel": dist.group.WORLD})


def refuse_given_mask() -> str:
    mask = torch.ones(200, 200, dtype=torch.bool).tril()
    attend = attend_under(lambda x: mask)
    return _message(attend, torch.randn(1, 200, 64), {"sequence_parallel": dist.group.WORLD})


def refuse_option(value: Any) -> str:
    if value == "not initialised":
        dist.destroy_process_group()
    if value == "two dimensions":
        value = init_device_mesh("cpu", (2, 1), mesh_dim_names=("tp", "sp"))
    if value == "no such dimension":
        value = (init_device_mesh("cpu", (2, 1), mesh_dim_names=("tp", "sp")), "cp")
    return _message(torch.relu, torch.randn(1, 200, 64), {"sequence_parallel": value})


def disagree(about: str) -> str:
    """Let the second rank come with another length, other options, another model or other keys of earlier chunks."""
    is_odd = dist.get_rank() == 1
    model: Callable[[Tensor], Tensor] = TwoLayers().eval()
    length = 196 if is_odd and about == "length" else 200
    options = {
        "sequence_parallel": dist.group.WORLD,
        "min_length": 10**6,
        "tau": 0.2 if is_odd and about == "options" else 0.1,
    }
    if is_odd and about == "graph":
        model = model.layers[0]  # type: ignore[attr-defined]
    if about == "past":
        model = attend_after(torch.full((1, 4, 72, 16), float(is_odd)))
    return _message(model, torch.randn(1, length, 64), options)


def _message(model: Callable[[Tensor], Tensor], x: Tensor, options: dict[str, Any]) -> str:
    try:
        torch.compile(model, backend=FlexPrefillBackend(), options=OPTIONS | options)(x)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"
