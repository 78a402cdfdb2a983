"""``flexprefill tune``: from what length on sparse prefill pays on this machine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..backend import FlexPrefillBackend
from ..bench.inputs.workloads import attend, create_structured_inputs, time_dense_ms, time_ms
from ..errors import UsageError
from ..report import format_table
from ..settings.device_defaults import name_device, store_crossing

LENGTHS = {"cpu": (1024, 2048, 4096, 8192), "cuda": (2048, 4096, 8192, 16384, 32768, 65536)}


def run_tune(device: str, heads: Sequence[int], head_dim: int) -> None:
    """Time dense and sparse attention of one layer at growing lengths, print both, and keep the crossing.

    Raises:
        UsageError: The device or the heads won't do.
    """
    kind = torch.device(device).type
    if kind not in LENGTHS or (kind == "cuda" and not torch.cuda.is_available()):
        raise UsageError(f"device must be cpu or cuda, and there, got {device}")
    if heads[0] % heads[1]:
        raise UsageError(f"query heads must be a multiple of key heads, got {heads[0]} and {heads[1]}")
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    backend = FlexPrefillBackend()
    # One graph for all lengths, as a model has that meets prompts of every length.
    sparse = torch.compile(attend, backend=backend, dynamic=True, options={"min_length": 64, "max_density": 1})
    rows, times = [], []
    for length in LENGTHS[kind]:
        query, key, value = create_structured_inputs(heads[0], heads[1], length, head_dim, device, dtype)
        with torch.no_grad():
            dense = time_dense_ms(query, key, value, 5)
            fastest = min(dense, key=lambda name: dense[name])
            sparse_ms = time_ms(lambda: sparse(query, key, value), kind, 5)  # noqa: B023  (called at once)
        times.append((length, dense[fastest], sparse_ms))
        rows.append([str(length), f"{dense[fastest]:.2f} ms ({fastest})", f"{sparse_ms:.2f} ms"])
    print(format_table(("tokens", "fastest dense", "sparse"), rows))
    name = name_device(torch.device(device))
    crossing = find_first_win(times)
    path = store_crossing(name, crossing)
    print(f"sparse prefill is taken to pay on {name} from {crossing} tokens on; kept in {path}")


def find_first_win(times: Sequence[tuple[int, float, float]]) -> int:
    """Return the length from which on sparse is as fast at each length: twice the longest where it never is.

    Args:
        times: Length in tokens, dense and sparse time, by growing length.
    """
    crossing = 2 * times[-1][0]
    for length, dense_ms, sparse_ms in reversed(times):
        if sparse_ms > dense_ms:
            break
        crossing = length
    return crossing
