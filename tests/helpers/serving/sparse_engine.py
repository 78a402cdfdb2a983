"""The plugin's two classes before the stand-ins of vLLM's, and steps whose output is checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexprefill_compile.integrations.vllm.mixins import AttendsSparsely, PlansPrefills
from flexprefill_compile.integrations.vllm.settings import make_settings

from ..models import relative_error
from .paged_engine import DenseBuilder, DenseImpl, Engine, Request

OPTIONS: dict[str, Any] = {"block_size": 32, "min_budget": 0, "min_length": 96}
DENSE = OPTIONS | {"gamma": 1.0}
CPU = torch.device("cpu")


class Builder(PlansPrefills, DenseBuilder):
    """A builder that plans."""


class Impl(AttendsSparsely, DenseImpl):
    """An implementation that attends sparsely."""

    max_tokens = (512, 256)


def build(options: dict[str, Any], layout: str = "heads first", **changes: Any) -> Engine:
    """Return an engine with these options; changes are to the implementation's attributes."""
    impl, builder = Impl(layout, **changes), Builder()
    impl.settings = builder.settings = make_settings(options, CPU, None)
    return Engine(layout, impl, builder)


def run(engine: Engine, scheduled: list[tuple[Request, int]], **kwargs: Any) -> list[Tensor]:
    """Run a step, check each request's output against dense attention, and return them."""
    outputs = engine.step(scheduled, **kwargs)
    for (request, _), output in zip(scheduled, outputs, strict=True):
        expected = engine.expect(request, request.done - len(output), request.done)
        assert relative_error(output, expected.double()) < 1e-5
    return outputs
