"""Before ranks exchange anything, find out whether they run the same graph on stretches of the same length.

Else a collective would hang, or mix up what it sends. The ranks compare three numbers a call; on GPUs the host waits
for them once, before the first layer.
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
) -> Callable[..., Any]:
    """Return a compiled graph that compares itself with those of the other ranks each time, before it runs.

    Args:
        compiled: The graph.
        group: The ranks.
        config: The options, of which all but the rank must be the same.
        calls: The attention calls of the graph, by name.
        length: Of the stretch, in tokens: a number, or a symbol of the graph's inputs.
        example_inputs: The inputs that the graph was compiled for.
    """
    options, graph = _digest(_describe_options(config)), _digest(calls)
    read_length = _find_length(length, example_inputs)

    def run(*args: Any) -> Any:
        compare_ranks(group, options, graph, read_length(args))
        return compiled(*args)

    return run


def compare_ranks(group: RankGroup, options: int, graph: int, length: int) -> None:
    """Compare what this rank is about to run with what the others are.

    Raises:
        RanksDisagreeError: On every rank, with the same sentence; or a rank didn't come.
    """
    process_group = find_process_group(group.name)
    device = torch.device("cuda" if "nccl" in dist.get_backend(process_group) else "cpu")
    own = torch.tensor([options, graph, length], device=device)
    gathered = [torch.empty_like(own) for _ in range(group.size)]
    try:
        dist.all_gather(gathered, own, group=process_group)
        rows = torch.stack(gathered).tolist()
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        raise RanksDisagreeError(
            f"sequence_parallel: not every rank of the {group.size} came to this prefill: {first}"
        ) from None
    all_options, all_graphs, all_lengths = zip(*rows, strict=True)
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
