"""The figures of the benchmark as text."""

from __future__ import annotations

import re

from flexprefill_compile.bench.tables import format_stages
from flexprefill_compile.bench.timing.rates import ATTENTION
from flexprefill_compile.bench.timing.stages import SELECTION_STAGES


def test_stages_stand_beside_their_floors() -> None:
    stages = dict.fromkeys(SELECTION_STAGES, 0.0) | {"pack_blocks": 0.25, ATTENTION: 3.0}
    run = {"tokens": 64, "inputs": "random", "stages_ms": stages, "floors_ms": {ATTENTION: 1.5}}
    table = format_stages([run | {"attention_flop_per_s": 4.2e14}, run])
    rows = [re.split(r" {2,}", line.rstrip()) for line in table.splitlines()[2:]]
    assert rows == [
        ["pack_blocks", "0.250", "0.250"],
        [ATTENTION, "3.000 (2.0x)", "3.000 (2.0x)"],
        ["that in TFLOP/s", "420"],
    ]
