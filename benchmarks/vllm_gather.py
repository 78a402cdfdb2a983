"""Time what the vLLM plugin adds to attention: a prompt's keys and values out of their pages, beside the attention.

A prompt comes in chunks. For each chunk: the gathering of all keys and values that it sees, from pages in random order,
and the attention to them, sparse by the options and at gamma 1. Structured inputs, bfloat16; no vLLM is needed. In a
serving engine the first chunk of a prompt gathers nothing.

Run: python benchmarks/vllm_gather.py --length 32768 --chunk 8192
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexprefill_compile.bench.inputs.structured import create_structured_inputs
from flexprefill_compile.bench.timing.clocks import time_in_turns_ms
from flexprefill_compile.integrations.vllm.pages import gather_pages, split_cache
from flexprefill_compile.integrations.vllm.prompt_attention import Form, attend_to_prompt
from flexprefill_compile.integrations.vllm.settings import Settings, make_settings
from flexprefill_compile.text_table import format_table

HEAD_DIM = 128


def main() -> None:
    """Print a row for each chunk of each model's heads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=heads, nargs="+", default=[(12, 2), (32, 8)], help="query,key heads of a layer")
    parser.add_argument("--length", type=int, default=32768, help="of the prompt, in tokens")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a step")
    parser.add_argument("--page-size", type=int, default=16, help="tokens of a page")
    parser.add_argument("--options", type=json.loads, default={}, help="of the sparse attention, as JSON")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--calls", type=int, default=20, help="timed calls of each kind")
    parser.add_argument("--json", type=Path, help="a file for all figures")
    options = parser.parse_args()
    figures = [figure for own in options.heads for figure in measure_heads(own, options)]
    rows = [
        [
            f"{figure['heads']}/{figure['kv_heads']}",
            f"{figure['start']}:{figure['end']}",
            *(f"{figure[name]:.3f}" for name in ("gather_ms", "sparse_ms", "gamma_1_ms")),
            f"{figure['gather_ms'] / figure['sparse_ms']:.1%}",
            f"{figure['gather_bytes'] / figure['gather_ms'] / 1e9:.2f}",
        ]
        for figure in figures
    ]
    titles = ("heads", "chunk", "gather ms", "sparse ms", "gamma 1 ms", "gather / sparse", "TB/s, read and written")
    print(format_table(titles, rows))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


def heads(text: str) -> tuple[int, int]:
    """Read "12,2"."""
    query, key = map(int, text.split(","))
    return query, key


def measure_heads(own: tuple[int, int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure each chunk of a prompt, in milliseconds."""
    query, key, value = create_structured_inputs(*own, options.length, HEAD_DIM, options.device, torch.bfloat16)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)  # a token's heads side by side, as in vLLM
    cache, table = fill_cache(key, value, options.page_size)
    key_pages, value_pages = split_cache(cache, HEAD_DIM)
    figures = []
    for start, end in itertools.pairwise([*range(0, options.length, options.chunk), options.length]):
        chunk = query[:, :, start:end]
        gather = functools.partial(gather_both, key_pages, value_pages, table, end)
        keys = gather()
        for gathered, original in zip(keys, (key, value), strict=True):
            torch.testing.assert_close(gathered, original[:, :, :end], rtol=0, atol=0)
        runs: list[Callable[[], object]] = [gather]
        for changes in ({}, {"gamma": 1.0}):
            settings = make_settings({"min_length": 1} | options.options | changes, query.device, None)
            runs.append(functools.partial(attend, chunk, *keys, settings))
        times = time_in_turns_ms(runs, options.device, options.calls)
        names = dict(zip(("gather_ms", "sparse_ms", "gamma_1_ms"), times, strict=True))
        nbytes = 2 * sum(x.nbytes for x in keys)
        figures.append(
            {"heads": own[0], "kv_heads": own[1], "start": start, "end": end, "gather_bytes": nbytes, **names}
        )
    return figures


def fill_cache(key: Tensor, value: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Lay a prompt into pages in random order.

    Args:
        key: (1, Hkv, S, D), S in whole pages.
        value: (1, Hkv, S, D).
        page_size: In tokens.

    Returns:
        vLLM's cache of a layer, (2, num_pages, page_size, Hkv, D), and the prompt's pages in it, (num_pages,) int32.
    """
    pages = torch.stack([x[0].transpose(0, 1).unflatten(0, (-1, page_size)) for x in (key, value)])
    generator = torch.Generator(key.device).manual_seed(0)
    table = torch.randperm(pages.shape[1], generator=generator, device=key.device)
    cache = torch.empty_like(pages)
    cache[:, table] = pages
    return cache, table.to(torch.int32)


def gather_both(key_pages: Tensor, value_pages: Tensor, table: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """Gather a prompt's keys and values up to a token: what the plugin does once a chunk and layer."""
    return gather_pages(key_pages, table, 0, end), gather_pages(value_pages, table, 0, end)


def attend(query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> Tensor:
    """Attend to a chunk as the plugin does."""
    config = settings.of_layer("layers.0", query.shape[1])
    assert config is not None
    output = attend_to_prompt(query, key, value, None, Form(HEAD_DIM**-0.5), config, settings.inductor)
    if not isinstance(output, Tensor):
        raise RuntimeError(f"the attention stays dense: {output}")
    return output


if __name__ == "__main__":
    with torch.inference_mode():
        main()
