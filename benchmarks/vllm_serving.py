"""Serve a model by vLLM, dense and sparse: equal tokens at gamma 1, time to first token, and a load of mixed requests.

Run: python benchmarks/vllm_serving.py --model PATH --lengths 8192 32768 --options '{"gamma": 0.9}'

It needs vLLM and its GPU. Each engine has a process of its own, one after the other: vLLM's FlashAttention, the plugin
at gamma 1, the plugin with the options. The exit status is 1 if tokens differ at gamma 1 or a request was lost. Tokens
that differ where their logits are equal up to rounding are a tie: it is told, and what follows it is not compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from flexprefill_compile.text_table import format_table

TEXTS = tuple(Path("/usr/share/common-licenses", name) for name in ("GPL-3", "Apache-2.0", "GPL-2", "LGPL-2.1"))
ENGINES = ("dense", "gamma 1", "sparse")
SHORT_TOKENS, NEW_TOKENS, TOP_LOGITS = 200, 64, 5
# The gap of a tie at most, in spacings of the logits' dtype: two engines, two logits, each of them within one spacing
# of what exact arithmetic gives. Half of it is the rounding of the logit, half that of the hidden state.
TIE_SPACINGS = 4


@dataclasses.dataclass
class Stream:
    """One request's output.

    Attributes:
        tokens: Generated so far.
        times_s: When each of them came, after the request was due.
        logits: The largest ones of each step, and the token's own, by token; empty if they were not asked for.
    """

    tokens: list[int]
    times_s: list[float]
    logits: list[dict[int, float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two engines' outputs for one prompt.

    Attributes:
        same: How many tokens are equal before the first that differs.
        gap: There, how much each engine prefers its own token to the other's, both added, in spacings of the logits'
            dtype; None if all tokens are equal.
        drift: The largest difference of a logit up to there, in spacings.
    """

    same: int
    gap: float | None
    drift: float


def main() -> int:
    """Measure each engine, print the tables, and tell whether all is right."""
    options = create_parser().parse_args()
    if options.engine:
        options.json.write_text(json.dumps(measure(options)))
        return 0
    results = {name: run_engine(name) for name in ENGINES}
    print(format_results(results), *describe_comparisons(compare_engines(results)), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    faults = find_faults(results)
    print("\n".join(faults) or "tokens at gamma 1 are those of vLLM's own attention, but for ties; no request was lost")
    return 1 if faults else 0


def create_parser() -> argparse.ArgumentParser:
    """Create the parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a name that vLLM knows")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768], help="of prompts, in tokens")
    parser.add_argument("--options", type=json.loads, default={}, help="of the sparse engine, as JSON")
    parser.add_argument("--texts", type=Path, nargs="+", default=TEXTS, help="prompts are cut from these, in a ring")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a step: longer prompts come in chunks")
    parser.add_argument("--rounds", type=int, default=5, help="prompts of each length, for the time to first token")
    parser.add_argument("--requests", type=int, default=40, help="of the load: every fourth is long")
    parser.add_argument("--interval", type=float, default=0.25, help="between the load's requests, in seconds")
    parser.add_argument("--vllm", type=json.loads, default={}, help="more arguments of vllm.LLM, as JSON")
    parser.add_argument("--json", type=Path, help="a file for all figures")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    return parser


def run_engine(name: str) -> dict[str, Any]:
    """Measure one engine in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, *sys.argv[1:], "--engine", name, "--json", file.name]
        subprocess.run(command, check=True)
        results: dict[str, Any] = json.loads(Path(file.name).read_text())
        return results


# In the engine's process


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure an engine; times are in seconds."""
    engine, tokens = create_engine(options)
    prompts = cut_prompts(tokens)
    longest = max(options.lengths)
    for length in options.lengths:  # compilation: a whole prompt, and chunks of one if it is longer than a step
        list(serve(engine, [(0.0, next(prompts)[:length])], 2))
    first_token_s = {
        length: [serve(engine, [(0.0, next(prompts)[:length])], 1)[0].times_s[0] for _ in range(options.rounds)]
        for length in options.lengths
    }
    ring = next(prompts)
    shared = [ring[:longest], ring[: longest // 2] + next(prompts)[: longest // 2]]
    batch = [*shared, *(next(prompts)[:n] for n in (SHORT_TOKENS, *options.lengths))]
    alone = [
        serve(engine, [(0.0, prompt)], NEW_TOKENS, TOP_LOGITS)[0] for prompt in shared
    ]  # the second finds the first's
    together = serve(engine, [(0.0, prompt) for prompt in batch], NEW_TOKENS, TOP_LOGITS)
    sizes = [longest if i % 4 == 0 else SHORT_TOKENS for i in range(options.requests)]
    load = [(i * options.interval, next(prompts)[:size]) for i, size in enumerate(sizes)]
    started = time.perf_counter()
    streams = serve(engine, load, NEW_TOKENS)
    return {
        "first_token_s": first_token_s,
        "tokens": [stream.tokens for stream in (*alone, *together)],
        "logits": [[list(step.items()) for step in stream.logits] for stream in (*alone, *together)],
        "epsilon": torch.finfo(engine.model_config.dtype).eps,
        "load": {**summarise(streams, sizes), "duration_s": time.perf_counter() - started},
        "lost": sum(len(stream.tokens) != NEW_TOKENS for stream in streams),
    }


def create_engine(options: argparse.Namespace) -> tuple[Any, list[int]]:
    """Start vLLM; return its engine and the texts' tokens."""
    from vllm import LLM  # noqa: PLC0415, it takes long

    changes = {"gamma 1": {"gamma": 1.0}, "sparse": {}}.get(options.engine)
    attention: dict[str, Any] = {"attention_backend": "FLASH_ATTN"}
    if changes is not None:
        config = {"flexprefill": options.options | changes}
        attention = {"attention_backend": "CUSTOM", "additional_config": config}
    sizes = {"max_model_len": max(options.lengths) + NEW_TOKENS, "max_num_batched_tokens": options.chunk}
    llm = LLM(options.model, **({"logprobs_mode": "raw_logits"} | sizes | attention | options.vllm))
    text = "\n".join(path.read_text() for path in options.texts)
    return llm.llm_engine, llm.get_tokenizer().encode(text)


def cut_prompts(tokens: Sequence[int]) -> Iterator[list[int]]:
    """Yield prompts as long as any that is needed: the text as a ring, from a new place each time."""
    for number in itertools.count():
        start = number * 997 % len(tokens)
        yield [*itertools.islice(itertools.cycle(tokens), start, start + 2**18)]


def serve(
    engine: Any, requests: Sequence[tuple[float, list[int]]], new_tokens: int, num_logits: int = 0
) -> list[Stream]:
    """Serve requests as they become due, each (seconds after the start, tokens), to the end; greedily."""
    from vllm import SamplingParams  # noqa: PLC0415

    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, logprobs=num_logits or None)
    streams, waiting, started = [Stream([], []) for _ in requests], list(enumerate(requests)), time.perf_counter()
    prefix = f"{started}-"  # a name is for one request
    while waiting or engine.has_unfinished_requests():
        now = time.perf_counter() - started
        while waiting and waiting[0][1][0] <= now:
            number, (_, prompt) = waiting.pop(0)
            engine.add_request(f"{prefix}{number}", {"prompt_token_ids": prompt}, sampling)
        if not engine.has_unfinished_requests():
            time.sleep(max(0.0, waiting[0][1][0] - now))
            continue
        for output in engine.step():
            number = int(output.request_id.removeprefix(prefix))
            stream, tokens = streams[number], list(output.outputs[0].token_ids)
            if tokens[: len(stream.tokens)] != stream.tokens:
                raise RuntimeError(f"the tokens of request {number} changed as they came")
            passed = time.perf_counter() - started - requests[number][0]
            stream.times_s += [passed] * (len(tokens) - len(stream.tokens))
            stream.tokens = tokens
            if num_logits:
                steps = output.outputs[0].logprobs
                stream.logits = [{token: entry.logprob for token, entry in step.items()} for step in steps]
    return streams


def summarise(streams: Sequence[Stream], sizes: Sequence[int]) -> dict[str, float]:
    """Return the load's figures: times to the first token, between tokens, and tokens in all."""
    first = [stream.times_s[0] for stream in streams]
    between = [b - a for stream in streams for a, b in itertools.pairwise(stream.times_s)]
    figures = {
        f"{name} p{percent}_s": find_percentile(times, percent)
        for name, times in (("first token", first), ("between tokens", between))
        for percent in (50, 99)
    }
    return figures | {"tokens": float(sum(sizes) + sum(len(stream.tokens) for stream in streams))}


def find_percentile(values: Sequence[float], percent: int) -> float:
    """Return a percentile: the value of that rank."""
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


# The tables


def format_results(results: dict[str, dict[str, Any]]) -> str:
    """Return the tables: times to first token by length, and the load."""
    lengths = list(results["dense"]["first_token_s"])
    first = [
        [name, *(f"{statistics.median(result['first_token_s'][length]) * 1000:.0f} ms" for length in lengths)]
        for name, result in results.items()
    ]
    load = [
        [
            name,
            f"{result['load']['tokens'] / result['load']['duration_s']:.0f}",
            *(f"{value * 1000:.0f} ms" for key, value in result["load"].items() if " p" in key),
        ]
        for name, result in results.items()
    ]
    figures = ("first token, p50", "p99", "between tokens, p50", "p99")
    return "\n\n".join(
        [
            "time to first token, one prompt at a time, median",
            format_table(("engine", *(f"{length} tokens" for length in lengths)), first),
            "under load",
            format_table(("engine", "tokens/s, prompts too", *figures), load),
        ]
    )


def compare_engines(results: dict[str, dict[str, Any]]) -> list[Comparison]:
    """Compare the plugin at gamma 1 with vLLM's own attention, prompt by prompt."""
    dense, sparse = results["dense"], results["gamma 1"]
    prompts = zip(dense["tokens"], sparse["tokens"], dense["logits"], sparse["logits"], strict=True)
    return [compare(*prompt, epsilon=dense["epsilon"]) for prompt in prompts]


def compare(
    tokens: Sequence[int],
    other_tokens: Sequence[int],
    logits: Sequence[Sequence[tuple[int, float]]],
    other_logits: Sequence[Sequence[tuple[int, float]]],
    epsilon: float,
) -> Comparison:
    """Compare two engines' outputs for one prompt up to the first token that differs.

    Args:
        tokens: Of one engine.
        other_tokens: Of the other.
        logits: Of each step, pairs of a token and its logit.
        other_logits: The other's.
        epsilon: The spacing of the logits' dtype at 1.
    """
    pairs = enumerate(zip(tokens, other_tokens, strict=True))
    same = next((step for step, (token, other) in pairs if token != other), len(tokens))
    steps = [(dict(own), dict(others)) for own, others in zip(logits, other_logits, strict=True)][: same + 1]
    spacings = [epsilon * 2.0 ** math.floor(math.log2(max(map(abs, own.values())))) for own, _ in steps]
    drifts = [
        abs(own[token] - others[token]) / spacing
        for (own, others), spacing in zip(steps, spacings, strict=True)
        for token in own.keys() & others.keys()
    ]
    gap = None
    if same < len(tokens):
        token, other, (own, others) = tokens[same], other_tokens[same], steps[same]
        gap = (own[token] - own.get(other, -math.inf) + others[other] - others.get(token, -math.inf)) / spacings[same]
    return Comparison(same, gap, max(drifts))


def describe_comparisons(comparisons: Sequence[Comparison]) -> list[str]:
    """Return what is known of the tokens at gamma 1, a line each."""
    compared = sum(comparison.same for comparison in comparisons)
    equal = sum(comparison.gap is None for comparison in comparisons)
    drift = max(comparison.drift for comparison in comparisons)
    lines = [
        f"gamma 1 beside vLLM's own attention: {equal} of {len(comparisons)} prompts with equal tokens, {compared} "
        f"equal tokens in all; logits differ by {drift:.1f} spacings at most"
    ]
    return lines + [
        f"prompt {number} parts at token {comparison.same}: a gap of {comparison.gap:.1f} spacings"
        for number, comparison in enumerate(comparisons)
        if comparison.gap is not None
    ]


def find_faults(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return what is wrong, a sentence each."""
    gaps = [comparison.gap for comparison in compare_engines(results)]
    unlike = [number for number, gap in enumerate(gaps) if gap is not None and gap > TIE_SPACINGS]
    faults = [f"at gamma 1 the tokens of prompts {unlike} are not those of vLLM's own attention"] if unlike else []
    lost = {name: result["lost"] for name, result in results.items() if result["lost"]}
    return faults + [f"{name}: {count} requests ended before their last token" for name, count in lost.items()]


if __name__ == "__main__":
    sys.exit(main())
