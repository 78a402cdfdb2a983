"""Under torchrun: one rank prints for all, what runs in one process says so, and a rank that fails ends the others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SMALL = ("--device", "cpu", "--heads", "4", "2", "--hidden", "64", "--intermediate", "64", "--vocabulary", "50")


ONE_FAILS = """
import torch
import torch.distributed as dist

dist.init_process_group("gloo")  # its timeout is half an hour

@torch.compile(backend="flexprefill", options={"sequence_parallel": dist.group.WORLD, "min_length": 2**20})
def attend(query, key, value):
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

with torch.no_grad():
    attend(*torch.randn(3, 1, 2, 32, 16))
    if dist.get_rank() == 1:
        raise RuntimeError("the second prompt is too much for me")
    attend(*torch.randn(3, 1, 2, 32, 16))
"""


def run_on_ranks(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TORCHRUN, *arguments], capture_output=True, text=True, timeout=150, check=False)


def test_bench_model_prints_a_line_for_each_way_and_kind_once() -> None:
    ways = ("--lengths", "256", "--parallel", "one", "sequence", "--kinds", "dense")
    result = run_on_ranks("-m", "flexprefill_compile", "bench-model", *SMALL, "--layers", "1", *ways)
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith(("one ", "sequence "))]
    assert [row[:3] for row in rows] == [["one", "256", "dense"], ["sequence", "256", "dense"]]
    assert rows[0][-1] == "0.0%"
    assert rows[1][-1] != "0.0%"


def test_a_command_of_one_process_is_refused() -> None:
    result = run_on_ranks("-m", "flexprefill_compile", "audit")
    assert result.returncode != 0
    assert "audit runs in one process: start it without torchrun" in result.stderr


def test_a_rank_that_fails_ends_the_others_with_its_message(tmp_path: Path) -> None:
    script = tmp_path / "one_fails.py"
    script.write_text(ONE_FAILS)
    result = run_on_ranks(str(script))
    assert result.returncode != 0
    assert "RuntimeError: the second prompt is too much for me" in result.stderr
