"""The ranks that share one prompt or one layer: what the options ``sequence_parallel`` and ``tensor_parallel`` name."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.distributed as dist

from .checks import InvalidOptionError, check

_EXPECTED = "None, a ProcessGroup, a DeviceMesh of one dimension, or (DeviceMesh, the name of a dimension)"


@dataclasses.dataclass(frozen=True)
class RankGroup:
    """A process group, as graphs and settings name it.

    Attributes:
        name: What torch.distributed calls the group.
        size: How many ranks it has.
        rank: This rank's place in it, from 0.
    """

    name: str
    size: int
    rank: int


@dataclasses.dataclass(frozen=True)
class HeadShard:
    """Which of a layer's query heads an attention call of this rank holds.

    Attributes:
        start: The first of them.
        count: How many.
        total: How many the layer has over all ranks.
    """

    start: int
    count: int
    total: int


def resolve_rank_group(name: str, value: Any) -> RankGroup | None:
    """Return the group that an option stands for.

    Args:
        name: Of the option.
        value: As the user gave it.

    Returns:
        None for no option.

    Raises:
        InvalidOptionError: It is no group, torch.distributed isn't initialised, or this rank is outside of the group.
    """
    if value is None or isinstance(value, RankGroup):
        return value
    if not (dist.is_available() and dist.is_initialized()):
        raise InvalidOptionError(
            f"{name} needs torch.distributed: call torch.distributed.init_process_group first, got {value!r}"
        )
    group = _find_group(name, value)
    rank = dist.get_rank(group)
    if rank < 0:
        raise InvalidOptionError(f"{name} must be a group of this rank, got one without rank {dist.get_rank()}")
    return RankGroup(group.group_name, dist.get_world_size(group), rank)


def shard_heads(count: int, tensor: RankGroup | None, sequence: RankGroup | None) -> HeadShard:
    """Return which query heads an attention call holds, from how many it holds.

    Tensor parallelism gives each rank a stretch of a layer's heads; sequence parallelism gives it a stretch of those.

    Args:
        count: Query heads of the call, after the exchange that sequence parallelism inserts.
        tensor: The ranks that a layer is sharded over.
        sequence: The ranks that a prompt is spread over.
    """
    tensor_rank, tensor_size = (tensor.rank, tensor.size) if tensor else (0, 1)
    sequence_rank, sequence_size = (sequence.rank, sequence.size) if sequence else (0, 1)
    start = count * (tensor_rank * sequence_size + sequence_rank)
    return HeadShard(start, count, count * tensor_size * sequence_size)


def _find_group(name: str, value: Any) -> Any:
    if isinstance(value, dist.ProcessGroup):
        return value
    from torch.distributed.device_mesh import DeviceMesh  # noqa: PLC0415  (not on every platform)

    mesh, dimension = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    check(name, value, _EXPECTED, isinstance(mesh, DeviceMesh))
    if dimension is None:
        check(name, value, _EXPECTED, mesh.ndim == 1)
        return mesh.get_group()
    names = mesh.mesh_dim_names or ()
    check(name, value, f"a dimension of its mesh: one of {', '.join(names)}", dimension in names)
    return mesh.get_group(dimension)
