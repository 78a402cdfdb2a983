"""A second process finds in inductor's caches what the first one compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# TwoLayers ends in a permuted output, as models do.
PREFILL = """
import sys, torch
from helpers.models import OPTIONS, TwoLayers
from torch._dynamo.utils import counters

_, action, artifacts = sys.argv
if action == "load":
    torch.compiler.load_cache_artifacts(open(artifacts, "rb").read())
torch.manual_seed(0)
with torch.no_grad():
    torch.compile(TwoLayers().eval(), backend="flexprefill", options=OPTIONS)(torch.randn(1, 256, 64))
print(counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_bypass"])
if action == "save":
    open(artifacts, "wb").write(torch.compiler.save_cache_artifacts()[0])
"""


def prefill(action: str, caches: Path, artifacts: Path) -> str:
    """Run the first prompt in a process of its own; return how often AOTAutograd's cache hit and was bypassed."""
    tests = str(Path(__file__).parents[1])
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(caches), "PYTHONPATH": tests}
    command = [sys.executable, "-c", PREFILL, action, str(artifacts)]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def test_caches_on_disk_and_saved_artifacts_hit_in_the_next_process(tmp_path: Path) -> None:
    artifacts = tmp_path / "artifacts"
    assert prefill("save", tmp_path / "first", artifacts) == "0 0"
    assert prefill("use", tmp_path / "first", artifacts) == "1 0"
    assert prefill("load", tmp_path / "other", artifacts) == "1 0"
