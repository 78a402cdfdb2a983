"""Time the selection under masks beside the selection of causal attention, on one GPU and the same inputs.

The default estimator, structured inputs, batch 1. "called" is the time between two calls as a user queues them,
"replayed" that of a CUDA graph, without the host's. The facts of a mask are computed once for all layers: not counted.

Run: python benchmarks/masked_selection.py --lengths 8192 32768
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from flexprefill_compile import SparsePrefillConfig
from flexprefill_compile.bench.inputs.structured import create_structured_inputs
from flexprefill_compile.bench.timing.clocks import time_in_turns_ms
from flexprefill_compile.bench.timing.stages import capture
from flexprefill_compile.block_masks.estimators.flexprefill.masked_representative import ScoreRule
from flexprefill_compile.block_masks.layout import AttentionSizes, count_blocks
from flexprefill_compile.block_masks.masked_prefill import select_masked_prefill_tables
from flexprefill_compile.block_masks.masks.facts import MaskFacts, describe_mask
from flexprefill_compile.block_masks.masks.intervals import classify_blocks
from flexprefill_compile.block_masks.prefill import select_prefill_tables
from flexprefill_compile.settings.device_defaults import resolve_selection
from flexprefill_compile.text_table import format_table

MaskMod = Callable[..., Tensor]


def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor, valid: Tensor, document: Tensor) -> Tensor:
    """What causal attention sees, given as a mask."""
    return query >= key


def window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor, valid: Tensor, document: Tensor) -> Tensor:
    """The last 4096 tokens."""
    return (query >= key) & (query - key < 4096)


def padded(batch: Tensor, head: Tensor, query: Tensor, key: Tensor, valid: Tensor, document: Tensor) -> Tensor:
    """Causal, without the first eighth of the keys."""
    return (query >= key) & valid[batch, key]


def packed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor, valid: Tensor, document: Tensor) -> Tensor:
    """Causal within each of four documents."""
    return (query >= key) & (document[batch, query] == document[batch, key])


def find_facts(mask: MaskMod, length: int, block_size: int) -> MaskFacts:
    """Return the facts of a mask on a GPU."""
    position = torch.arange(length, device="cuda")
    captures = ((position >= length // 8)[None], (position // (length // 4))[None])
    traced = make_fx(mask)(*(torch.zeros(1, 1, dtype=torch.int64, device="cuda") for _ in range(4)), *captures)
    sizes = AttentionSizes(1, 1, length, length)
    bounds = classify_blocks(traced, captures, sizes, block_size, torch.device("cuda"))
    return describe_mask(traced, captures, sizes, bounds, 0, mask is packed, block_size)


def main() -> None:
    """Print a row for each mask and length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--heads", type=int, nargs=2, default=[32, 8], help="query and key heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--calls", type=int, default=20, help="timed calls of each kind")
    arguments = parser.parse_args()
    config = resolve_selection(SparsePrefillConfig(), [], torch.device("cuda"))
    scale = arguments.head_dim**-0.5
    rows = []
    for length in arguments.lengths:
        query, key, value = create_structured_inputs(
            *arguments.heads, length, arguments.head_dim, "cuda", torch.bfloat16
        )
        width = count_blocks(length, config.block_size)
        selections: dict[str, Callable[[], object]] = {
            "no mask": lambda inputs=(query, key, value), width=width: select_prefill_tables(
                *inputs, scale, config, width
            )
        }
        for mask in (causal, window, padded, packed):
            facts = find_facts(mask, length, config.block_size)
            selections[mask.__name__] = lambda inputs=(query, key, value), facts=facts: select_masked_prefill_tables(
                *inputs, facts, ScoreRule(scale), config
            )
        called = time_in_turns_ms(list(selections.values()), "cuda", arguments.calls)
        replayed = time_in_turns_ms([capture(run) for run in selections.values()], "cuda", arguments.calls)
        for name, call_ms, replay_ms in zip(selections, called, replayed, strict=True):
            ratios = (f"{call_ms / called[0]:.2f}x", f"{replay_ms / replayed[0]:.2f}x")
            rows.append([str(length), name, f"{call_ms:.3f}", f"{replay_ms:.3f}", *ratios])
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, heads {arguments.heads}, bfloat16")
    print(format_table(["tokens", "mask", "called ms", "replayed ms", "called / no mask", "replayed / no mask"], rows))


if __name__ == "__main__":
    main()
