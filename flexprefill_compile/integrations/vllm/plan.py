"""Which requests of a step run sparse, and what is left for vLLM: its metadata, read on the CPU.

row  tokens   keys                                         prefills          rest
0    0        900    a decode step                                           row 0, token 0
1    1..4096  8192   the second half of a prompt     ->    row 1
2    4097     1300   a decode step                                           row 2, token 4097
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Prefill:
    """A request whose scheduled tokens attend sparsely.

    Attributes:
        row: Its place in the batch, and in the block table.
        start: Its first token in the step's flat list of tokens.
        query_length: How many tokens it has there.
        key_length: How many tokens of it are known with them: those in the cache and these.
    """

    row: int
    start: int
    query_length: int
    key_length: int

    @property
    def tokens(self) -> slice:
        """Where its tokens are in the step's flat list."""
        return slice(self.start, self.start + self.query_length)

    @property
    def context(self) -> int:
        """How many tokens were computed before: in earlier chunks, or found in the prefix cache."""
        return self.key_length - self.query_length


@dataclasses.dataclass(frozen=True)
class Rest:
    """The requests that vLLM attends to.

    Attributes:
        tokens: (num_tokens,) int64, where their tokens are in the step's flat list.
        metadata: Of them alone, as vLLM's builder makes it.
    """

    tokens: Tensor
    metadata: Any


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What becomes of a step's requests.

    Attributes:
        prefills: Those that attend sparsely, at least one.
        rest: The others; None if there are none.
    """

    prefills: tuple[Prefill, ...]
    rest: Rest | None


def find_prefills(common: Any, min_length: int, block_size: int) -> tuple[Prefill, ...]:
    """Choose the requests that attend sparsely.

    Lengths come from vLLM's copies on the CPU: no device sync. Those of rows in the prefill phase are exact there; of
    others they may be an upper bound.

    Args:
        common: vLLM's CommonAttentionMetadata.
        min_length: In tokens; shorter contexts are left to vLLM.
        block_size: In tokens; chunks of one block are left to vLLM, for their tables would be compiled once more.
    """
    starts: list[int] = common.query_start_loc_cpu.tolist()
    rows = zip(
        starts, starts[1:], common.seq_lens_cpu_upper_bound.tolist(), common.is_prefilling.tolist(), strict=False
    )
    return tuple(
        Prefill(row, start, end - start, keys)
        for row, (start, end, keys, is_prefilling) in enumerate(rows)
        if is_prefilling and end - start > block_size and keys >= min_length
    )


# What a step's metadata says of requests beside their number and lengths: it must be known to be split.
_BY_ROW = ("seq_lens", "block_table_tensor", "seq_lens_cpu_upper_bound", "is_prefilling", "req_idx")
_BY_TOKEN = ("slot_mapping",)
_OF_ALL = ("max_seq_len", "causal")
_COUNTED = ("query_start_loc", "query_start_loc_cpu", "num_reqs", "num_actual_tokens", "max_query_len")
_DROPPED = ("positions",)  # FlashAttention has no use for them


def find_refusal(common: Any, common_prefix_length: int) -> str | None:
    """Return why a whole step is left to vLLM, or None.

    Args:
        common: vLLM's CommonAttentionMetadata.
        common_prefix_length: Of cascade attention, in tokens; 0 without it.
    """
    if common.is_prefilling is None or common.seq_lens_cpu_upper_bound is None:
        return "it doesn't say which requests are prefills; before vLLM 0.26 set VLLM_USE_V2_MODEL_RUNNER=0"
    if common_prefix_length > 0:
        return "cascade attention"
    if common.causal is not True:
        return "attention that is not causal"
    known = {*_BY_ROW, *_BY_TOKEN, *_OF_ALL, *_COUNTED, *_DROPPED}
    fields = [field.name for field in dataclasses.fields(common) if not field.name.startswith("_")]
    unknown = [name for name in fields if name not in known and _is_given(getattr(common, name))]
    return f"a step with {', '.join(unknown)}" if unknown else None


def _is_given(value: Any) -> bool:
    return value is not None and not (isinstance(value, dict | list | tuple) and not value)


def take_rest(common: Any, prefills: Sequence[Prefill]) -> tuple[Any, Tensor] | None:
    """Return the metadata of the requests that are left to vLLM, and their tokens (num_tokens,) int64.

    None if there are none. Rows without tokens, which pad a batch, are dropped.
    """
    starts: list[int] = common.query_start_loc_cpu.tolist()
    taken = {prefill.row for prefill in prefills}
    rows = [row for row in range(len(starts) - 1) if row not in taken and starts[row + 1] > starts[row]]
    if not rows:
        return None
    lengths = [starts[row + 1] - starts[row] for row in rows]
    own_starts = torch.tensor([0, *lengths], dtype=common.query_start_loc_cpu.dtype).cumsum(0, dtype=torch.int32)
    tokens = torch.cat([torch.arange(starts[row], starts[row + 1]) for row in rows])
    device = common.seq_lens.device
    where = {"cpu": torch.tensor(rows), device.type: torch.tensor(rows).to(device, non_blocking=True)}
    tokens = tokens.to(device, non_blocking=True)
    fields = {field.name for field in dataclasses.fields(common)}
    changes: dict[str, Any] = {name: None for name in fields if name.startswith("_") or name in _DROPPED}
    changes |= {name: _take(getattr(common, name), where) for name in _BY_ROW if name in fields}
    changes |= {name: getattr(common, name).index_select(0, tokens) for name in _BY_TOKEN}
    changes |= {"num_reqs": len(rows), "num_actual_tokens": sum(lengths), "max_query_len": max(lengths)}
    changes |= {"query_start_loc_cpu": own_starts, "query_start_loc": own_starts.to(device, non_blocking=True)}
    return common.replace(**changes), tokens


def _take(value: Any, where: dict[str, Tensor]) -> Any:
    """Return the rows of a tensor, on its device, or of a numpy array."""
    if isinstance(value, Tensor):
        return value.index_select(0, where[value.device.type])
    return None if value is None else value[where["cpu"].numpy()]


@functools.cache
def log_once(message: str) -> None:
    """Say why attention is left to vLLM, once in a process."""
    logger.warning("attention is left to vLLM: %s", message)
