"""Compile a function with the installed backend, and check that its attention ran sparse.

The backend's name is its entry point, so this also checks that the installed package declares it.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor


@torch.compile(backend="flexprefill", options={"min_length": 1, "min_budget": 0, "block_size": 32, "gamma": 0.5})
def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute causal attention."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def main() -> None:
    """Run it once."""
    with torch.no_grad():
        query, key, value = torch.randn(3, 1, 2, 256, 32)
        output = attend(query, key, value)

    import flexprefill_compile  # noqa: PLC0415  (the entry point must have loaded it before)
    from flexprefill_compile.block_masks import record_densities  # noqa: PLC0415

    if not str(flexprefill_compile.__file__).startswith(sys.prefix):
        sys.exit(f"this is not the wheel: {flexprefill_compile.__file__}")
    with torch.no_grad(), record_densities() as densities:
        again = attend(query, key, value)
    if len(densities) != 1 or not (densities[0] < 1).all() or not torch.equal(output, again):
        sys.exit(f"the attention did not run sparse: {densities}")
    print(f"{flexprefill_compile.__file__}: {densities[0].mean():.0%} of the blocks computed")


if __name__ == "__main__":
    main()
