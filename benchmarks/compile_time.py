"""Measure what compilation adds to the first prompt of SmolLM2, dense and sparse, all layers or one for all.

Run: python benchmarks/compile_time.py                    (empty caches, then the same again with warm ones)
     python benchmarks/compile_time.py --tokens 8192 --threads 2

Each run is a process of its own; dense and sparse runs take turns. User time counts the C++ compiler's too, and
depends less than wall time on what else the machine does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.fx import GraphModule

sys.path.insert(0, str(Path(__file__).parents[1]))

from flexprefill_compile import compile_layers_once
from flexprefill_compile.models import load_model, read_tokens
from flexprefill_compile.passes.base import GraphPass
from flexprefill_compile.text_table import format_table

BACKENDS = {"dense": "inductor", "sparse": "flexprefill"}
ONCE = ", layers once"
KINDS = [kind + how for how in ("", ONCE) for kind in BACKENDS]
# Of dynamo's own clocks: their names, and what they contain beside what is listed before them.
STEPS = {
    "compiling, all": "_compile.compile_inner",
    "backend": "OutputGraph.call_user_compiler",
    "inductor": "fx_codegen_and_compile",
    "C++ compiler": "compile_file",
}


def measure(kind: str, tokens: int) -> dict[str, Any]:
    """Run the first prompt in this process; return seconds by step, and what the caches did."""
    model, tokenizer = load_model(None, "cpu")
    input_ids, _ = read_tokens(tokenizer, None, max_tokens=tokens)
    if kind.endswith(ONCE):
        compile_layers_once(model)
    backend = BACKENDS[kind.removesuffix(ONCE)]
    options = {"min_length": 1} if backend == "flexprefill" else {}
    compiled = torch.compile(model, backend=backend, options=options)
    seconds = []
    with torch.no_grad(), timed_passes() as seconds_of_passes:
        for _ in range(3):
            start, start_user = time.perf_counter(), _user_s()
            compiled(input_ids, use_cache=True)
            seconds.append((time.perf_counter() - start, _user_s() - start_user))
    (first, first_user), *later = seconds
    run, run_user = (min(times) for times in zip(*later, strict=True))
    clocks = torch._dynamo.utils.compilation_time_metrics
    return {
        "added to the first prompt": first - run,
        "the same, user time": first_user - run_user,
        **{step: sum(clocks.get(name, [0])) for step, name in STEPS.items()},
        "the passes": sum(seconds_of_passes),
        "graphs from the cache": torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"],
    }


@contextlib.contextmanager
def timed_passes() -> Iterator[list[float]]:
    """Collect the seconds that each of this project's passes takes meanwhile."""
    seconds: list[float] = []
    run = GraphPass.__call__

    def timed(own: GraphPass, graph_module: GraphModule) -> None:
        start = time.perf_counter()
        run(own, graph_module)
        seconds.append(time.perf_counter() - start)

    with mock.patch.object(GraphPass, "__call__", timed):
        yield seconds


def _user_s() -> float:
    """Return the user time of this process and of those that it waited for."""
    return sum(resource.getrusage(who).ru_utime for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def run_apart(kind: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure in a fresh process, whose caches are in a folder."""
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / str(KINDS.index(kind))),
        "OMP_NUM_THREADS": str(arguments.threads),
        "TORCHINDUCTOR_COMPILE_THREADS": str(arguments.threads),
    }
    command = [sys.executable, __file__, "--kind", kind, "--tokens", str(arguments.tokens)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measure each kind cold and warm, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kind:
        print(json.dumps(measure(arguments.kind, arguments.tokens)))
        return
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            (kind, caches, run_apart(kind, Path(folder), arguments)) for caches in ("cold", "warm") for kind in KINDS
        ]
    rows = [(kind, caches, *(f"{figure:.1f}" for figure in run.values())) for kind, caches, run in runs]
    print(format_table(("seconds", "caches", *runs[0][2]), rows))


if __name__ == "__main__":
    main()
