"""Print the table of docs/many-gpus.md: how many tokens fit, from the formula there, by model and number of GPUs.

python benchmarks/tokens_that_fit.py --memory 76
"""

from __future__ import annotations

import argparse
import dataclasses

GIB = 2**30
RANKS = (1, 2, 4, 8, 16, 32, 64)
TENSOR_RANKS = (2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder in bfloat16; the letters are those of the formula."""

    weights: float
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int = 128


SHAPES = {
    "8B": Shape(16.1e9, 32, 4096, 14336, 32, 8),
    "70B": Shape(141.1e9, 80, 8192, 28672, 64, 8),
}


def bytes_a_card(shape: Shape, tokens: int, tensor: int, sequence: int) -> float:
    """Return what one card of ``tensor * sequence`` holds at the peak of a prefill: the formula of the page."""
    cache = 4 * shape.layers * shape.kv_heads * shape.head_dim / min(tensor, shape.kv_heads)
    activations = 6 * shape.intermediate / tensor + 6 * shape.hidden
    tables = 8 * shape.heads / (tensor * sequence) * (tokens / 128) ** 2
    return shape.weights / tensor + tokens / sequence * (cache + activations) + tables


def most_tokens(shape: Shape, tensor: int, sequence: int, memory: float) -> int | None:
    """Return the most tokens that fit, in steps of 1024; None if the ranks can't share the heads."""
    if shape.heads % (tensor * sequence):
        return None
    low, high = 0, 2**17
    while low < high:
        middle = (low + high + 1) // 2
        if bytes_a_card(shape, middle * 1024, tensor, sequence) <= memory:
            low = middle
        else:
            high = middle - 1
    return low * 1024


def describe(tokens: int | None) -> str:
    """Return a cell of the table."""
    if tokens is None:
        return ""
    return "no" if tokens == 0 else f"{tokens // 1024}k"


def main() -> None:
    """Print a row for each model and number of GPUs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", type=float, default=76, help="GiB of a card that tensors can have")
    memory = parser.parse_args().memory * GIB
    mixed = " | ".join(f"{t} x n/{t}" for t in TENSOR_RANKS)
    print(f"| model | GPUs | sequence | tensor | {mixed} |\n|---|---|---|---|{'---|' * len(TENSOR_RANKS)}")
    for name, shape in SHAPES.items():
        for ranks in RANKS:
            cells = [most_tokens(shape, 1, ranks, memory)]
            cells.append(most_tokens(shape, ranks, 1, memory) if ranks <= shape.kv_heads else None)
            cells += [most_tokens(shape, t, ranks // t, memory) if ranks > t else None for t in TENSOR_RANKS]
            print(f"| {name} | {ranks} | {' | '.join(map(describe, cells))} |")


if __name__ == "__main__":
    main()
