"""What `pooled` could be made of: fewer or more queries, shorter or longer means of keys, exact rows beside them.

Run: python benchmarks/pooled_variants.py --model FOLDER --texts FILE --lengths 32768 --gamma 0.8 --min-budget 1024

Takes the options of ``flexprefill bench-real`` and those below; --sparse adds methods to compare with. Variants run in
plain PyTorch: their losses tell, their times don't.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from torch import Tensor

from flexprefill_compile import register_estimator
from flexprefill_compile.block_masks.estimators.block_shares import compute_block_shares
from flexprefill_compile.block_masks.estimators.inputs import EstimatorInputs
from flexprefill_compile.block_masks.estimators.pooled import pool_keys, sample_queries
from flexprefill_compile.commands.cli import main

Scores = Callable[[EstimatorInputs], Tensor]


def pool(stride: int, tokens: int) -> Scores:
    """Return the estimator that takes one query in ``stride`` over the means of ``tokens`` keys."""
    return lambda inputs: compute_block_shares(
        inputs, sample_queries(inputs, stride), pool_keys(inputs, tokens), inputs.scale
    )


def mix(stride: int, tokens: int, rows: int) -> Scores:
    """Return the mean of that and of so many exact rows a block."""
    return lambda inputs: (pool(stride, tokens)(inputs) + inputs.share_of_rows(rows)) / 2


VARIANTS: dict[str, Scores] = {
    **{
        f"queries-{stride}-keys-{tokens}": pool(stride, tokens)
        for stride, tokens in ((4, 16), (4, 32), (8, 16), (8, 32), (16, 32), (8, 64))
    },
    "queries-8-keys-32-rows-4": mix(8, 32, 4),
}


def list_arguments(arguments: list[str]) -> list[str]:
    """Return the arguments of bench-real: one method for each variant, block size, gamma and floor."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--gamma", type=float, nargs="+", default=[0.8])
    parser.add_argument("--min-budget", type=int, nargs="+", default=[1024])
    parser.add_argument("--block-size", type=int, nargs="+", default=[64])
    own, rest = parser.parse_known_args(arguments)
    for name in own.variants:
        for size in own.block_size:
            for gamma in own.gamma:
                for floor in own.min_budget:
                    rest += ["--sparse", f"estimator={name},gamma={gamma},min_budget={floor},block_size={size}"]
    return ["bench-real", *rest]


if __name__ == "__main__":
    for name, scores in VARIANTS.items():
        register_estimator(name, scores)
    sys.exit(main(list_arguments(sys.argv[1:])))
