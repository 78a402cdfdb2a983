"""What `auto` could be made of: exact rows, antidiagonals and means of both, each by several strides.

Run: python benchmarks/auto_variants.py --device cuda --texts licences python code --lengths 8192 \
         --gammas 0.8 0.9 0.95 0.98 --min-budgets 256 512 --json variants.json

Takes the options of benchmarks/pareto.py; the names for --estimators are those of VARIANTS, all of them by default.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import pareto
from torch import Tensor

from flexprefill_compile import register_estimator
from flexprefill_compile.block_masks.estimators.inputs import EstimatorInputs
from flexprefill_compile.block_masks.estimators.xattention import score_antidiagonals

Scores = Callable[[EstimatorInputs], Tensor]


def take_rows(tokens: int) -> Scores:
    """Return the estimator that computes one row of so many tokens."""
    return lambda inputs: inputs.share_of_rows(inputs.block_size // tokens)


def take_tiles(stride: int) -> Scores:
    """Return the estimator that sums the antidiagonals of tiles."""
    return lambda inputs: score_antidiagonals(inputs, stride)


def mix(tokens: int, stride: int) -> Scores:
    """Return the mean of both."""
    return lambda inputs: (take_rows(tokens)(inputs) + take_tiles(stride)(inputs)) / 2


VARIANTS: dict[str, Scores] = {
    **{f"rows-{tokens}": take_rows(tokens) for tokens in (8, 16)},
    **{f"tiles-{stride}": take_tiles(stride) for stride in (4, 8, 16)},
    **{
        f"rows-{tokens}-tiles-{stride}": mix(tokens, stride)
        for tokens, stride in ((4, 16), (8, 8), (8, 16), (8, 32), (16, 8), (16, 16))
    },
}


if __name__ == "__main__":
    for name, scores in VARIANTS.items():
        register_estimator(name, scores)
    if "--estimators" not in sys.argv:
        sys.argv += ["--estimators", *VARIANTS]
    sys.exit(pareto.main())
