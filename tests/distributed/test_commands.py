"""Commands under torchrun: one rank prints for all, and what runs in one process says so."""

from __future__ import annotations

import subprocess
import sys

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SMALL = ("--device", "cpu", "--heads", "4", "2", "--hidden", "64", "--intermediate", "64", "--vocabulary", "50")


def run_on_ranks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, "-m", "flexprefill_compile", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)


def test_bench_model_prints_a_line_for_each_way_and_kind_once() -> None:
    result = run_on_ranks(
        "bench-model", *SMALL, "--layers", "1", "--lengths", "256", "--parallel", "one", "sequence", "--kinds", "dense"
    )
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith(("one ", "sequence "))]
    assert [row[:3] for row in rows] == [["one", "256", "dense"], ["sequence", "256", "dense"]]
    assert rows[0][-1] == "0.0%"
    assert rows[1][-1] != "0.0%"


def test_a_command_of_one_process_is_refused() -> None:
    result = run_on_ranks("audit")
    assert result.returncode != 0
    assert "audit runs in one process: start it without torchrun" in result.stderr
