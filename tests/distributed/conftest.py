"""One pool of processes serves all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers.distributed.pool import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.stop()
