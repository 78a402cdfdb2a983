"""Run the core tests with each torch that the package supports, on a CPU, each in an environment of its own.

Run: python benchmarks/torch_versions.py                       (makes the environments that are missing)
     python benchmarks/torch_versions.py --versions 2.15.0 --tests tests/passes
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from flexprefill_compile.text_table import format_table  # noqa: E402

VERSIONS = ("2.11.0", "2.12.0", "2.13.0", "2.14.1", "2.15.0")
# What a version needs other than constraints.txt: Triton 3.6's interpreter fails with numpy 2.4.
INSTEAD = {"2.11.0": {"numpy": "numpy<2.4"}}
CORE_TESTS = ("tests/settings", "tests/front_door", "tests/passes", "tests/block_masks", "tests/fuzz")


class Run(NamedTuple):
    """One run of the tests: the packages' versions, the last line of pytest, and how long it took in minutes."""

    torch: str
    transformers: str
    summary: str
    minutes: float


def find_python(version: str, folder: Path) -> Path:
    """Return the interpreter of an environment with a version of torch, made if it is missing.

    The other packages are those of constraints.txt, but for what torch itself pins and for ``INSTEAD``.
    """
    environment = folder / f"torch-{version}"
    python = environment / "bin" / "python"
    if not python.exists():
        venv.create(environment, with_pip=True)
        constraints = environment / "constraints.txt"
        lines = (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
        instead = INSTEAD.get(version, {})
        left_out = tuple(f"{name}==" for name in ("torch", *instead))
        constraints.write_text("".join(line for line in lines if not line.startswith(left_out)))
        pip = [python, "-m", "pip", "install", "--quiet", "--constraint", constraints]
        subprocess.run([*pip, f"torch=={version}", *instead.values(), f"{ROOT}[hf,plot,dev]"], check=True)
    # The tests run against this checkout, whichever the environment was made for.
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--editable", ROOT], check=True)
    return python


def run_tests(python: Path, tests: list[str]) -> Run:
    """Run tests on one core and return what became of them; failures are printed."""
    show = "import torch, transformers; print(torch.__version__, transformers.__version__)"
    versions = subprocess.run([python, "-c", show], check=True, capture_output=True, text=True).stdout.split()
    command = [python, "-m", "pytest", "-q", "-n", "1", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    started = time.monotonic()
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    minutes = (time.monotonic() - started) / 60
    if result.returncode:
        print(result.stdout[-20000:], result.stderr[-2000:])
    last_line = result.stdout.strip().splitlines()[-1] if result.stdout.strip() else "no output"
    return Run(*versions, re.sub(r"=+ ?| in .*", "", last_line), minutes)


def main() -> None:
    """Run the tests in each environment and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=VERSIONS, help="of torch")
    parser.add_argument("--tests", nargs="+", default=CORE_TESTS, help="what pytest runs")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venvs", help="where the environments are")
    arguments = parser.parse_args()

    runs = [run_tests(find_python(v, arguments.folder.absolute()), list(arguments.tests)) for v in arguments.versions]
    header = ("torch", "transformers", "tests", "minutes")
    print(format_table(header, [(*run[:3], f"{run.minutes:.1f}") for run in runs]))
    sys.exit(any("failed" in run.summary or "passed" not in run.summary for run in runs))


if __name__ == "__main__":
    main()
