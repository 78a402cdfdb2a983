"""Run prompts of random lengths, batches, padding and chunks through compiled models for a long time.

Run: python benchmarks/soak.py --minutes 60 --json soak.json
     python benchmarks/soak.py --minutes 10 --device cuda --cuda-graphs

A small Llama with random weights is compiled twice: at gamma 1, where each prompt must equal the eager model's dense
attention, and at the estimator's own gamma, where a prompt must give the same twice. Without CUDA graphs, half of the
prompts run in three threads at once. A CUDA graph serves one shape, so lengths come from a short list there; torch
keeps CUDA graphs by thread, so there are no threads.

Prints a line a minute. The exit status is 1 if one of these does not hold: results equal, graphs bounded; after half of
the prompts, hardly anything compiled, memory flat but for what graphs take, and no token slower.
"""

from __future__ import annotations

import argparse
import contextvars
import copy
import dataclasses
import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from soak_laws import HEADERS, Record, find_faults, fit_slope, format_record, take_second_half
from soak_prompts import KINDS_OF_CHUNKS, Prompt, draw_prompts, prefill
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from flexprefill_compile.block_masks import record_densities
from flexprefill_compile.text_table import format_table

MIN_LENGTH = 256
GRAPH_LENGTHS = (200, 640, 1024, 1500, 2048)
NUM_LAYERS = 2
THREADS, TURNS_BETWEEN_THREADS = 3, 4
# For each of two models, a batch of one or more, with a mask or without: a first chunk of each kind; a later one of
# each kind after one token or more, a short one after little or much. Twice as many: threads compile the same at once,
# and dynamo tells apart lengths that happened to be equal when it compiled.
MOST_GRAPHS = 2 * 2 * 2 * (len(KINDS_OF_CHUNKS) + 2 * (len(KINDS_OF_CHUNKS) + 1)) * 2
# For each model, length, batch, with a mask or without: whole, a first half or a second one. Twice: a CUDA graph of a
# second half belongs to that of its first half, and both are recorded anew where dynamo made a new graph.
MOST_RECORDINGS = 2 * 2 * len(GRAPH_LENGTHS) * 2 * 2 * 3
# Times the error of the eager model itself: sums come in another order, not with other roundings.
MARGIN = 4


def create_model(seed: int) -> LlamaForCausalLM:
    """Create a small Llama, float32. Its weights are so large that attention is sharp and matters to the logits."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "initializer_range": 0.25}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": NUM_LAYERS}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, eos_token_id=None, **sizes, **heads)).eval()


def measure_error(actual: Tensor, expected: Tensor, prompt: Prompt) -> float:
    """Return the largest error of a prompt's logits, relative to the largest of them; padding does not count."""
    seen = prompt.is_token
    return float((actual[seen].double() - expected[seen]).abs().max() / expected[seen].abs().max())


def derive_tolerance(eager: nn.Module, prompts: Sequence[Prompt]) -> float:
    """Return the error at gamma 1 that rounding explains: the eager model's own against float64, and a margin."""
    exact = copy.deepcopy(eager).double()
    with torch.no_grad():
        return MARGIN * max(measure_error(prefill(eager, prompt), prefill(exact, prompt), prompt) for prompt in prompts)


@dataclasses.dataclass(frozen=True)
class Checked:
    """What a prompt gave: errors as in ``Record``, seconds of one sparse prefill, densities of its selections."""

    error: float
    sparse_error: float
    seconds: float
    densities: tuple[float, ...]
    faults: tuple[str, ...]


class Soak:
    """The models, the prompts, and what they have done."""

    def __init__(self, seed: int, device: str, dtype: torch.dtype, *, has_graphs: bool) -> None:
        self.eager = create_model(seed).to(device, dtype)
        settings = {"min_length": MIN_LENGTH, "triton.cudagraphs": has_graphs}
        self.dense, self.sparse = (
            torch.compile(self.eager, backend="flexprefill", dynamic=not has_graphs, options=settings | options)
            for options in ({"gamma": 1.0}, {"min_budget": 128})
        )
        lengths = GRAPH_LENGTHS if has_graphs else None
        self.prompts = draw_prompts(seed, device, lengths)
        others = draw_prompts(seed + 1, device, lengths)
        self.tolerance = derive_tolerance(self.eager, [next(others) for _ in range(8)])
        self.device, self.has_graphs = device, has_graphs
        self.turn, self.pool = 0, ThreadPoolExecutor(THREADS)

    def check(self, prompt: Prompt, *, is_alone: bool) -> Checked:
        """Run a prompt through each model."""
        try:
            return self._check(prompt, is_alone=is_alone)
        except Exception as error:
            return Checked(0.0, 0.0, 0.0, (), (f"{type(error).__name__} {str(error)[:500]}: {prompt}",))

    @torch.no_grad()
    def _check(self, prompt: Prompt, *, is_alone: bool) -> Checked:
        expected, dense, first = (prefill(model, prompt) for model in (self.eager, self.dense, self.sparse))
        with record_densities() as recorded:
            start = self._now()
            second = prefill(self.sparse, prompt)
            seconds = self._now() - start
        # With others at once, their selections are among those recorded; replayed CUDA graphs record none.
        densities = [float(density.mean()) for density in recorded] if is_alone and not self.has_graphs else []
        error = measure_error(dense, expected, prompt)
        seen, faults = prompt.is_token, []
        if not error <= self.tolerance:
            faults.append(f"gamma 1 is {error:.1e} from dense: {prompt}")
        if not first[seen].isfinite().all():
            faults.append(f"not finite: {prompt}")
        if not torch.equal(first[seen], second[seen]):
            faults.append(f"not the same twice, by {measure_error(second, first, prompt):.1e}: {prompt}")
        if is_alone and not self.has_graphs and min(prompt.chunks) >= MIN_LENGTH:
            missing = NUM_LAYERS * len(prompt.chunks) - len(densities)
            faults += [f"{missing} attention calls ran dense: {prompt}"] if missing else []
        return Checked(
            error, measure_error(first, expected, prompt), seconds * is_alone, tuple(densities), tuple(faults)
        )

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def run_turn(self) -> tuple[list[Prompt], list[Checked]]:
        """Run a prompt, or some in threads at once."""
        self.turn += 1
        if self.has_graphs or self.turn % TURNS_BETWEEN_THREADS:
            prompt = next(self.prompts)
            return [prompt], [self.check(prompt, is_alone=True)]
        prompts = [next(self.prompts) for _ in range(THREADS)]
        # A thread starts with torch's own limits; a copy of the context brings those that were set here.
        runs = [
            self.pool.submit(contextvars.copy_context().run, lambda own=prompt: self.check(own, is_alone=False))
            for prompt in prompts
        ]
        return prompts, [run.result() for run in runs]

    def run_minute(self, started: float, seconds: float) -> Record:
        """Run prompts for some seconds, and at least one."""
        deadline = time.monotonic() + seconds
        prompts: list[Prompt] = []
        checked: list[Checked] = []
        while not prompts or time.monotonic() < deadline:
            own = self.run_turn()
            prompts += own[0]
            checked += own[1]
        alone = sum(p.tokens.numel() for p, one in zip(prompts, checked, strict=True) if one.seconds)
        densities = [density for one in checked for density in one.densities]
        return Record(
            minute=(time.monotonic() - started) / 60,
            prompts=len(prompts),
            tokens=sum(prompt.tokens.numel() for prompt in prompts),
            us_per_token=1e6 * sum(one.seconds for one in checked) / max(alone, 1),
            tensors=count_tensors(),
            resident_mib=_resident_mib(),
            allocated_mib=torch.cuda.memory_allocated() / 2**20,
            reserved_mib=torch.cuda.memory_reserved() / 2**20,
            graphs=torch._dynamo.utils.counters["stats"]["unique_graphs"],
            recordings=count_recordings() if self.has_graphs else 0,
            density=sum(densities) / max(len(densities), 1),
            worst_error=max(one.error for one in checked),
            sparse_error=max(one.sparse_error for one in checked),
            faults=tuple(fault for one in checked for fault in one.faults),
        )


def count_tensors() -> int:
    """Return how many tensors Python's garbage collector knows, after a collection."""
    gc.collect()
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


def count_recordings() -> int:
    """Return how many CUDA graphs torch has recorded in this thread."""
    from torch._inductor.cudagraph_trees import get_container  # noqa: PLC0415  # needs CUDA

    manager = get_container(torch.cuda.current_device()).tree_manager
    waiting = [node for nodes in manager.roots.values() for node in nodes] if manager else []
    count = 0
    while waiting:
        count += 1
        waiting += [child for nodes in waiting.pop().children.values() for child in nodes]
    return count


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> int:
    """Run, print, and tell whether all held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two records")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--cuda-graphs", action="store_true", help="as torch.compile's mode reduce-overhead")
    parser.add_argument("--json", type=Path, help="a file for all figures, written each minute")
    arguments = parser.parse_args()
    if arguments.cuda_graphs and arguments.device != "cuda":
        parser.error("--cuda-graphs needs --device cuda")
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
    # Dynamo runs what it has compiled eight times uncompiled: too few for all these kinds of prompts.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4 * MOST_GRAPHS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    soak = Soak(arguments.seed, arguments.device, getattr(torch, arguments.dtype), has_graphs=arguments.cuda_graphs)
    records: list[Record] = []
    started = time.monotonic()
    print(f"tolerance at gamma 1: {soak.tolerance:.1e}", *HEADERS, sep=" | ", flush=True)
    while time.monotonic() - started < arguments.minutes * 60:
        records.append(soak.run_minute(started, arguments.every))
        print(*format_record(records[-1]), *records[-1].faults[:3], sep=" | ", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps([dataclasses.asdict(record) for record in records], indent=1))
    return report(records, soak.tolerance, arguments.device)


def report(records: Sequence[Record], tolerance: float, device: str) -> int:
    """Print up to 12 of the records and what did not hold; return the exit status."""
    rows = [*records[:: -(-len(records) // 11)], records[-1]]
    print(format_table(HEADERS, [format_record(record) for record in rows]))
    prompts, tokens = (sum(getattr(record, name) for record in records) for name in ("prompts", "tokens"))
    name = torch.cuda.get_device_name() if device == "cuda" else device
    print(f"torch {torch.__version__}, {name}: {prompts} prompts, {tokens} tokens, tolerance {tolerance:.1e}")
    slope = fit_slope(take_second_half(records), "resident_mib")
    print(
        f"memory in the second half: {slope.per_hour:+.0f} MiB an hour, standard error {slope.error:.0f}, and "
        f"{slope.per_graph:+.0f} a graph"
    )
    faults = find_faults(records, tolerance, MOST_GRAPHS, MOST_RECORDINGS)
    print("\n".join(faults) or "all results equal, graphs bounded, no growth of memory but by graphs")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
