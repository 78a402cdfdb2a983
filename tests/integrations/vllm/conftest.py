"""Each test starts without compiled attention, and with nothing logged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flexprefill_compile.integrations.vllm import plan
from flexprefill_compile.integrations.vllm.prompt_attention import compiled_attention


@pytest.fixture(autouse=True)
def fresh_plugin() -> Iterator[None]:
    plan.log_once.cache_clear()
    compiled_attention.clear()
    yield
    compiled_attention.clear()
