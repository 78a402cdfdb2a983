"""Time the classification of a mask's blocks from intervals beside torch's create_block_mask, which reads every pair.

Each figure is the median of timed calls after one that warms up.

Run: python benchmarks/block_classification.py --length 16384
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import create_block_mask

from flexprefill_compile.block_masks.layout import AttentionSizes
from flexprefill_compile.block_masks.masks.intervals import classify_blocks
from flexprefill_compile.text_table import format_table

BLOCK_SIZE = 128


def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor, valid: Tensor, document: Tensor) -> Tensor:
    """What causal attention sees."""
    return query >= key


def window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor, valid: Tensor, document: Tensor) -> Tensor:
    """The last 4096 tokens."""
    return (query >= key) & (query - key < 4096)


def padded(batch: Tensor, head: Tensor, query: Tensor, key: Tensor, valid: Tensor, document: Tensor) -> Tensor:
    """Causal, without padded keys."""
    return (query >= key) & valid[batch, key]


def packed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor, valid: Tensor, document: Tensor) -> Tensor:
    """Causal within each document."""
    return (query >= key) & (document[batch, query] == document[batch, key])


def time_ms(run: Callable[[], object], device: str, calls: int) -> float:
    """Return the median of ``calls`` timed calls, in milliseconds, after one that warms up."""
    times = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[1:])


def main() -> None:
    """Print a row for each mask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--calls", type=int, default=5, help="timed calls of each kind")
    arguments = parser.parse_args()
    device, length, calls = arguments.device, arguments.length, arguments.calls
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {length} tokens")

    position = torch.arange(length, device=device)
    captures = ((position >= length // 5)[None], (position // 3000)[None])
    sizes = AttentionSizes(1, 1, length, length)
    rows = []
    for mask in (causal, window, padded, packed):
        mask_mod = make_fx(mask)(*(torch.zeros(1, 1, dtype=torch.int64, device=device) for _ in range(4)), *captures)

        def classify(*captures: Tensor, mask_mod: GraphModule = mask_mod) -> object:
            return classify_blocks(mask_mod, captures, sizes, BLOCK_SIZE, torch.device(device))

        def mask_pairs(b: Tensor, h: Tensor, q: Tensor, k: Tensor, mask: Callable[..., Tensor] = mask) -> Tensor:
            return mask(b, h, q, k, *captures)

        torch.compiler.reset()
        ours = (classify, torch.compile(make_fx(classify)(*captures)))
        theirs = (create_block_mask, torch.compile(create_block_mask))
        times = [time_ms(partial(run, *captures), device, calls * 5) for run in ours]
        times += [time_ms(partial(run, mask_pairs, *sizes, device, BLOCK_SIZE), device, calls) for run in theirs]
        ratios = [f"{100 * fast / slow:.2f} %" for slow in times[2:] for fast in times[:2]]
        rows.append([mask.__name__, *(f"{ms:.2f} ms" for ms in times), *ratios])
    names = ("intervals", "compiled", "create_block_mask", "compiled")
    shares = ("share", "compiled", "share of compiled", "compiled")
    print(format_table(("mask", *names, *shares), rows))


if __name__ == "__main__":
    main()
