"""``flexprefill tune``: the length from which on sparse prefill is no slower than dense, on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from ..backend import FlexPrefillBackend
from ..bench.inputs.structured import create_structured_inputs
from ..bench.timing.clocks import time_ms
from ..bench.timing.dense_attention import attend, time_dense_ms
from ..settings.device_defaults import name_device, store_break_even_length
from ..text_table import format_table
from .shared.arguments import add_layer_shape
from .shared.checks import check_device, check_heads

HELP = "measure the break-even length of sparse prefill on this machine"

_LENGTHS = {"cpu": (1024, 2048, 4096, 8192), "cuda": (2048, 4096, 8192, 16384, 32768, 65536)}
_CALLS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_layer_shape(parser)


def run(arguments: argparse.Namespace) -> None:
    """Time dense and sparse attention of one layer at growing lengths, print both, and keep the break-even length.

    Raises:
        UsageError: The device or the heads won't do.
    """
    device, heads = arguments.device, arguments.heads
    kind = device.partition(":")[0]
    check_device(kind)
    check_heads(heads)
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    # One graph for all lengths, as a model has that meets prompts of every length.
    backend = FlexPrefillBackend()
    sparse = torch.compile(attend, backend=backend, dynamic=True, options={"min_length": 64, "max_density": 1})
    rows, times = [], []
    for length in _LENGTHS[kind]:
        query, key, value = create_structured_inputs(heads[0], heads[1], length, arguments.head_dim, device, dtype)
        with torch.no_grad():
            dense = time_dense_ms(query, key, value, _CALLS)
            fastest = min(dense, key=lambda name: dense[name])
            sparse_ms = time_ms(lambda: sparse(query, key, value), kind, _CALLS)  # noqa: B023  (called at once)
        times.append((length, dense[fastest], sparse_ms))
        rows.append([str(length), f"{dense[fastest]:.2f} ms ({fastest})", f"{sparse_ms:.2f} ms"])
    print(format_table(("tokens", "fastest dense", "sparse"), rows))
    name = name_device(torch.device(device))
    break_even = compute_break_even_length(times)
    path = store_break_even_length(name, break_even)
    print(f"the break-even length on {name} is {break_even} tokens; kept in {path}")


def compute_break_even_length(times: Sequence[tuple[int, float, float]]) -> int:
    """Return the length from which on sparse is as fast at each length: twice the longest where it never is.

    Args:
        times: Length in tokens, dense and sparse time, by growing length.
    """
    break_even = 2 * times[-1][0]
    for length, dense_ms, sparse_ms in reversed(times):
        if sparse_ms > dense_ms:
            break
        break_even = length
    return break_even
