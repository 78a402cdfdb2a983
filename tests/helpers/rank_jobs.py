"""What ranks run in the tests of many GPUs: functions of a process group, on CPU tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flexprefill_compile.backend import FlexPrefillBackend

from .models import TwoLayers

OPTIONS: dict[str, Any] = {"block_size": 32, "min_budget": 0, "min_length": 64}


def stretch_of(x: Tensor, group: Any, dim: int = 1) -> Tensor:
    return x.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)]


def prefill_layers(group: Any, length: int, gamma: float, dynamic: bool | None) -> tuple[int, float]:
    torch.manual_seed(0)
    model = TwoLayers().eval()
    x = torch.randn(1, length, 64)
    options = OPTIONS | {"gamma": gamma}
    expected = torch.compile(model, backend=FlexPrefillBackend(), options=options, dynamic=dynamic)(x)
    torch.compiler.reset()
    backend = FlexPrefillBackend()
    spread = torch.compile(model, backend=backend, options=options | {"sequence_parallel": group}, dynamic=dynamic)
    actual = spread(stretch_of(x, group))
    error = (actual - stretch_of(expected, group)).abs().max().item()
    return backend.report.num_rewritten, error
