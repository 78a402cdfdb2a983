"""Each test starts without compiled code; inductor's caches on disk stay, so that a second run is short."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # Triton's kernels run in its interpreter; it looks when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from helpers.tiny_model import save_tiny_model

from flexprefill_compile.backend import flexprefill
from flexprefill_compile.settings import registry

# What CI says of a change should not depend on the draw.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch.manual_seed(0)
    torch.compiler.reset()
    flexprefill.reset()  # dynamo forgets backends that were reset before
    torch._dynamo.utils.counters.clear()
    registered = dict(registry._registered)
    yield
    registry._registered.clear()
    registry._registered.update(registered)
    torch.compiler.reset()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))
