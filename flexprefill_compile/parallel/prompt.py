"""Stretches of a prompt, one a rank: cut the inputs, gather the cache, take the last token's logits from its rank.

rank 0: tokens 0 to S/n - 1,  rank 1: tokens S/n to 2 S/n - 1,  ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..settings.checks import InvalidOptionError
from ..settings.rank_groups import RankGroup, resolve_rank_group
from ..torch_internals import find_process_group

CacheT = TypeVar("CacheT")


def is_first_rank() -> bool:
    """Tell whether this process prints for all: rank 0, or a process without others."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def take_stretch(x: Tensor, group: Any, dim: int = 1) -> Tensor:
    """Return this rank's stretch of an input that every rank has whole: token or position ids, a padding mask.

    Args:
        x: Tokens along ``dim``.
        group: As the option ``sequence_parallel`` takes it.
        dim: Of the tokens.

    Raises:
        InvalidOptionError: The ranks can't share the tokens evenly, or ``group`` is no group.
    """
    ranks = _resolve(group)
    if x.shape[dim] % ranks.size:
        raise InvalidOptionError(
            f"{x.shape[dim]} tokens can't be shared evenly by {ranks.size} ranks: pad the prompt to a multiple"
        )
    return x.chunk(ranks.size, dim)[ranks.rank]


def broadcast_last(x: Tensor, group: Any, dim: int = 1) -> Tensor:
    """Return the last token's slice of a prompt's output on every rank: the logits that decoding starts from.

    Args:
        x: This rank's stretch of the output, (B, S/n, vocabulary).
        group: As the option ``sequence_parallel`` takes it.
        dim: Of the tokens.

    Returns:
        (B, 1, vocabulary), the last rank's.
    """
    ranks = _resolve(group)
    process_group = find_process_group(ranks.name)
    last = x.narrow(dim, -1, 1).clone(memory_format=torch.contiguous_format)  # not the caller's own
    dist.broadcast(last, dist.get_global_rank(process_group, ranks.size - 1), group=process_group)
    return last


def gather_cache(cache: CacheT, group: Any, past: int = 0) -> CacheT:
    """Give every rank the keys and values of the whole prompt, so that each can decode, or take the next chunk.

    Args:
        cache: A Hugging Face ``DynamicCache``, changed in place, or a sequence of (key, value),
            (B, Hkv, past + S/n, D) each.
        group: As the option ``sequence_parallel`` takes it.
        past: How many tokens of it every rank had before this chunk.

    Returns:
        The cache, (B, Hkv, past + S, D) in each layer.

    Raises:
        InvalidOptionError: It is another kind of cache, or a layer of it keeps the last tokens only.
    """
    ranks = _resolve(group)
    layers = getattr(cache, "layers", None)
    if layers is not None:
        for number, layer in enumerate(layers):
            _check_layer(number, layer)
            layer.keys, layer.values = (_gather(x, ranks, past) for x in (layer.keys, layer.values))
        return cache
    if not isinstance(cache, Sequence):
        raise InvalidOptionError(f"cache must be a DynamicCache or a sequence of (key, value), got {cache!r}")
    gathered: Any = type(cache)(tuple(_gather(x, ranks, past) for x in pair) for pair in cache)  # type: ignore[call-arg]
    return gathered  # type: ignore[no-any-return]


def _check_layer(number: int, layer: Any) -> None:
    """Refuse what isn't a plain growing layer: its keys aren't a stretch, or have room for more."""
    if type(layer).__name__ != "DynamicLayer":
        raise InvalidOptionError(f"layer {number} of the cache is a {type(layer).__name__}, not a DynamicLayer")


def _gather(x: Tensor, ranks: RankGroup, past: int) -> Tensor:
    earlier, own = x[..., :past, :], x[..., past:, :].contiguous()
    stretches = [torch.empty_like(own) for _ in range(ranks.size)]
    dist.all_gather(stretches, own, group=find_process_group(ranks.name))
    return torch.cat([earlier, *stretches], dim=-2)


def _resolve(group: Any) -> RankGroup:
    ranks = resolve_rank_group("group", group)
    if ranks is None:
        raise InvalidOptionError("group must be a ProcessGroup or a DeviceMesh, got None")
    return ranks
