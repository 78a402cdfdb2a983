"""Run prompts of random lengths, batches, padding and chunks through one compiled model for a long time.

Run: python benchmarks/soak.py --minutes 60 --json soak.json
     python benchmarks/soak.py --minutes 10 --device cuda --cuda-graphs     (under CUDA graphs)

A small Llama with random weights is compiled twice: at gamma 1, where each prompt must equal the eager model's dense
attention, and at the estimator's own gamma, where a prompt must give the same twice. Without CUDA graphs, every
eighth turn prompts run in three threads at once. CUDA graphs are one for each shape, so lengths come from a short list
there; torch keeps them by thread, so threads take no part.

Prints a line a minute; the exit status is 1 if one of these does not hold: results equal, graphs bounded, no
recompilation after the first half, memory flat in the second half.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from flexprefill_compile.text_table import format_table

MIN_LENGTH, LONGEST = 512, 2048
GRAPH_LENGTHS = (300, 640, 1024, 1500, 2048)
THREADS, TURNS_BETWEEN_THREADS = 3, 8
# One graph for each of: a batch of one or more, no mask or a mask, with or without a cache before it, short or long.
MOST_GRAPHS = 2 * 2**4
# Sums of LONGEST terms in float32 through the layers, with a hundredfold margin.
TOLERANCE = 100 * torch.finfo(torch.float32).eps * LONGEST**0.5
# Allocators keep some arenas more or less; a leak of one activation a prompt passes this within minutes.
MOST_GROWTH_MIB = 64.0


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt to run.

    Attributes:
        tokens: (B, S) int64.
        mask: (B, S) int64, 1 at tokens and 0 at padding; None is no mask.
        chunks: Lengths of the pieces that it comes in; their sum is S.
    """

    tokens: Tensor
    mask: Tensor | None
    chunks: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Record:
    """What was seen by the end of a minute.

    Attributes:
        minute: Since the start.
        prompts: In this minute.
        tokens: In this minute, padding included.
        resident_mib: Memory of the process.
        device_mib: Reserved memory of the GPU; 0 on a CPU.
        graphs: Compiled since the start.
        worst_error: Of gamma 1 in this minute, relative to the largest logit of the eager model.
        faults: Results of this minute that do not hold.
    """

    minute: float
    prompts: int
    tokens: int
    resident_mib: float
    device_mib: float
    graphs: int
    worst_error: float
    faults: tuple[str, ...]


def draw_prompts(seed: int, device: str, lengths: Sequence[int] | None) -> Iterator[Prompt]:
    """Draw prompts for ever: of any length up to ``LONGEST``, or of these lengths."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    while True:
        batch = draw.choice((1, 1, 2, 3) if lengths is None else (1, 2))
        length = draw.choice(lengths) if lengths else draw.randint(16, LONGEST)
        tokens = torch.randint(256, (batch, length), generator=generator).to(device)
        yield Prompt(tokens, _draw_mask(draw, batch, length, device), _draw_chunks(draw, length, is_free=not lengths))


def _draw_mask(draw: random.Random, batch: int, length: int, device: str) -> Tensor | None:
    side = draw.choice(("none", "left", "right"))
    if side == "none":
        return None
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in mask:
        padding = draw.randrange(length // 2)
        row[:padding] = 0
        if side == "right":
            row.copy_(row.flip(0))
    return mask.to(device)


def _draw_chunks(draw: random.Random, length: int, *, is_free: bool) -> tuple[int, ...]:
    if not is_free:
        return (length,) if draw.random() < 0.5 else (length // 2, length - length // 2)
    ends = sorted({*draw.sample(range(1, length), draw.randrange(3)), length})
    return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))


def prefill(model: nn.Module, prompt: Prompt) -> Tensor:
    """Return the logits of a prompt, (B, S, vocabulary), from its chunks."""
    torch.compiler.cudagraph_mark_step_begin()
    cache, stop, logits = DynamicCache(), 0, []
    for length in prompt.chunks:
        start, stop = stop, stop + length
        mask = None if prompt.mask is None else prompt.mask[:, :stop]
        output = model(prompt.tokens[:, start:stop], attention_mask=mask, past_key_values=cache, use_cache=True)
        logits.append(output.logits.clone())
    return torch.cat(logits, 1)


class Soak:
    """The models and what they have done."""

    def __init__(self, seed: int, device: str, *, has_graphs: bool) -> None:
        torch.manual_seed(seed)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(vocab_size=256, num_hidden_layers=2, eos_token_id=None, **sizes)
        self.eager = LlamaForCausalLM(config).eval().to(device)
        settings = {"min_length": MIN_LENGTH, "triton.cudagraphs": has_graphs}
        self.dense, self.sparse = (
            torch.compile(self.eager, backend="flexprefill", options=settings | options)
            for options in ({"gamma": 1.0}, {"min_budget": 128})
        )
        self.has_threads = not has_graphs

    def check(self, prompt: Prompt) -> tuple[float, list[str]]:
        """Run a prompt through each model; return the error at gamma 1, and what does not hold."""
        with torch.no_grad():
            expected, dense, *sparse = (
                prefill(model, prompt) for model in (self.eager, self.dense, self.sparse, self.sparse)
            )
        seen = torch.ones_like(prompt.tokens, dtype=torch.bool) if prompt.mask is None else prompt.mask.bool()
        error = float((dense - expected)[seen].abs().max() / expected[seen].abs().max())
        where = f"batch {prompt.tokens.shape[0]}, chunks {prompt.chunks}, {'no ' if prompt.mask is None else ''}mask"
        faults = []
        if not error <= TOLERANCE:
            faults.append(f"gamma 1 is {error:.2g} from dense: {where}")
        if not sparse[0][seen].isfinite().all():
            faults.append(f"not finite: {where}")
        if not torch.equal(sparse[0][seen], sparse[1][seen]):
            faults.append(f"not the same twice: {where}")
        return error, faults

    def run_minute(self, prompts: Iterator[Prompt], started: float, seconds: float) -> Record:
        """Run prompts for some seconds."""
        worst, faults, count, tokens, turn = 0.0, [], 0, 0, 0
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            turn += 1
            at_once = THREADS if self.has_threads and turn % TURNS_BETWEEN_THREADS == 0 else 1
            drawn = [next(prompts) for _ in range(at_once)]
            with ThreadPoolExecutor(at_once) as pool:
                checked = list(pool.map(self.check, drawn)) if at_once > 1 else [self.check(drawn[0])]
            count += at_once
            tokens += sum(prompt.tokens.numel() for prompt in drawn)
            worst = max(worst, *(error for error, _ in checked))
            faults += [fault for _, own in checked for fault in own]
        minute = (time.monotonic() - started) / 60
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        return Record(minute, count, tokens, _resident_mib(), _device_mib(), graphs, worst, tuple(faults))


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _device_mib() -> float:
    return torch.cuda.memory_reserved() / 2**20 if torch.cuda.is_available() else 0.0


def find_faults(records: Sequence[Record]) -> list[str]:
    """Return a sentence for each thing that does not hold."""
    faults = [fault for record in records for fault in record.faults]
    last = records[-1]
    later = [record for record in records if record.minute > last.minute / 2]
    if last.graphs > MOST_GRAPHS:
        faults.append(f"{last.graphs} graphs were compiled, more than {MOST_GRAPHS}")
    if later[0].graphs < last.graphs:
        faults.append(f"{last.graphs - later[0].graphs} graphs were compiled in the second half")
    for name in ("resident_mib", "device_mib"):
        growth = getattr(last, name) - getattr(later[0], name)
        if growth > MOST_GROWTH_MIB:
            faults.append(f"{name} grew by {growth:.0f} MiB in the second half")
    return faults


def format_record(record: Record) -> list[str]:
    """Lay out a minute as a row."""
    return [
        f"{record.minute:.0f}",
        str(record.prompts),
        str(record.tokens),
        f"{record.resident_mib:.0f}",
        f"{record.device_mib:.0f}",
        str(record.graphs),
        f"{record.worst_error:.1e}",
        str(len(record.faults)),
    ]


HEADERS = ("minute", "prompts", "tokens", "resident MiB", "GPU MiB", "graphs so far", "worst error", "faults")


def main() -> int:
    """Run, print, and tell whether all held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two records")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--cuda-graphs", action="store_true", help="as torch.compile's mode reduce-overhead")
    parser.add_argument("--json", type=Path, help="a file for all figures, written each minute")
    arguments = parser.parse_args()
    # Dynamo runs what it has compiled eight times uncompiled: too few for all these kinds of prompts.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4 * MOST_GRAPHS
    soak = Soak(arguments.seed, arguments.device, has_graphs=arguments.cuda_graphs)
    prompts = draw_prompts(arguments.seed, arguments.device, GRAPH_LENGTHS if arguments.cuda_graphs else None)
    records: list[Record] = []
    started = time.monotonic()
    while time.monotonic() - started < arguments.minutes * 60:
        records.append(soak.run_minute(prompts, started, arguments.every))
        print(*format_record(records[-1]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps([dataclasses.asdict(record) for record in records], indent=1))
    return report(records, arguments)


def report(records: Sequence[Record], arguments: argparse.Namespace) -> int:
    """Print up to 12 of the records and what did not hold; return the exit status."""
    shown = records[:: -(-len(records) // 12)]
    total: dict[str, Any] = {name: sum(getattr(record, name) for record in records) for name in ("prompts", "tokens")}
    print(format_table(HEADERS, [format_record(record) for record in shown]))
    print(f"torch {torch.__version__}, {arguments.device}: {total['prompts']} prompts, {total['tokens']} tokens")
    faults = find_faults(records)
    print("\n".join(faults) or "all results equal, graphs bounded, memory flat")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
