"""Before ranks exchange anything, find out whether they run the same graph on stretches of the same length.

Else a collective would hang, or mix up what it sends. The ranks compare four numbers a call; on GPUs the host waits
for them once, before the first layer. One of the four sums up what earlier chunks left in the cache: every rank must
have the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import SymInt, Tensor

from ..settings.config import SparsePrefillConfig
from ..settings.rank_groups import RankGroup
from ..torch_internals import find_process_group


class RanksDisagreeError(RuntimeError):
    """The ranks of one group have different options, models or lengths."""


def agree_first(
    compiled: Callable[..., Any],
    group: RankGroup,
    config: SparsePrefillConfig,
    calls: Sequence[str],
    length: Any,
    example_inputs: Sequence[Any],
    past: Sequence[int] = (),
) -> Callable[..., Any]:
    """Return a compiled graph that compares itself with those of the other ranks each time, before it runs.

    Args:
        compiled: The graph.
        group: The ranks.
        config: The options, of which all but the rank must be the same.
        calls: The attention calls of the graph, by name.
        length: Of the stretch, in tokens: a number, or a symbol of the graph's inputs.
        example_inputs: The inputs that the graph was compiled for.
        past: Which of them hold keys and values of earlier chunks.
    """
    options, graph = _digest(_describe_options(config)), _digest(calls)
    read_length = _find_length(length, example_inputs)

    def run(*args: Any) -> Any:
        compare_ranks(group, options, graph, read_length(args), [args[place] for place in past])
        return compiled(*args)

    return run


def compare_ranks(group: RankGroup, options: int, graph: int, length: int, past: Sequence[Tensor] = ()) -> None:
    """Compare what this rank is about to run with what the others are.

    Args:
        group: The ranks.
        options: A digest.
        graph: A digest.
        length: Of the stretch.
        past: Keys and values of earlier chunks, which are read once.

    Raises:
        RanksDisagreeError: On every rank, with the same sentence; or a rank didn't come.
    """
    process_group = find_process_group(group.name)
    device = torch.device("cuda" if "nccl" in dist.get_backend(process_group) else "cpu")
    numbers = torch.tensor([options, graph, length], device=device)
    own = torch.cat([numbers, _sum_bits(past).to(device)])
    gathered = [torch.empty_like(own) for _ in range(group.size)]
    try:
        dist.all_gather(gathered, own, group=process_group)
        rows = torch.stack(gathered).tolist()
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        raise RanksDisagreeError(
            f"sequence_parallel: not every rank of the {group.size} came to this prefill: {first}"
        ) from None
    all_options, all_graphs, all_lengths, all_pasts = zip(*rows, strict=True)
    if len(set(all_options)) > 1:
        raise RanksDisagreeError("sequence_parallel: the ranks have different options; give all of them the same")
    if len(set(all_graphs)) > 1:
        raise RanksDisagreeError(
            "sequence_parallel: the ranks run different graphs; call the same model on all of them"
        )
    if len(set(all_lengths)) > 1:
        raise RanksDisagreeError(
            f"sequence_parallel: the ranks hold stretches of {', '.join(map(str, all_lengths))} tokens; they must be "
            "equal: pad the prompt to a multiple of the ranks"
        )
    if len(set(all_pasts)) > 1:
        raise RanksDisagreeError(
            "sequence_parallel: the ranks have different keys and values of earlier chunks; "
            "call gather_cache after each"
        )


def _sum_bits(tensors: Sequence[Tensor]) -> Tensor:
    """Return a number that differs where tensors do: int64, (1,), on their device."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [number * x.view(bits[x.itemsize]).sum(dtype=torch.int64) for number, x in enumerate(tensors, start=1)]
    return torch.stack(sums).sum(0, keepdim=True) if sums else torch.zeros(1, dtype=torch.int64)


def _describe_options(config: SparsePrefillConfig) -> object:
    values = dataclasses.asdict(config)
    groups = [value and value["size"] for value in (values.pop("sequence_parallel"), values.pop("tensor_parallel"))]
    return sorted(values.items()), groups


def _digest(value: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7])


def _find_length(length: Any, example_inputs: Sequence[Any]) -> Callable[[Sequence[Any]], int]:
    """Return a function that reads the length of the stretch from the inputs of the graph."""
    if not isinstance(length, SymInt):
        return lambda args: int(length)
    for place, example in enumerate(example_inputs):
        if isinstance(example, SymInt) and example.node.expr == length.node.expr:
            return lambda args: int(args[place])
        if isinstance(example, Tensor):
            for dim, size in enumerate(example.shape):
                if isinstance(size, SymInt) and size.node.expr == length.node.expr:
                    return lambda args: int(args[place].shape[dim])
    return lambda args: _digest([arg for arg in args if isinstance(arg, int)])
