"""Launching Triton kernels again without working out anew what to compile: that takes longer than short prompts do."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

MOST_SIGNATURES = 1024

_compiled: dict[Any, dict[Any, Any]] = {}


# Triton's own functions of these names take microseconds each, as constants may be given to them too.
def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least ``n``, which is at least 1."""
    return 1 << (n - 1).bit_length()


class Launcher:
    """Launches kernels on inputs of one signature.

    Args:
        signature: All that Triton compiles for: devices, dtypes, shapes, strides, alignments, settings. Constants and
            sizes must follow from it.
    """

    def __init__(self, signature: Hashable) -> None:
        if len(_compiled) >= MOST_SIGNATURES and signature not in _compiled:
            _compiled.clear()
        self.compiled = _compiled.setdefault(signature, {})

    def run(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        constants: dict[str, Any],
        *,
        num_warps: int,
        num_stages: int = 3,
        most_registers: int | None = None,
        variant: Hashable = None,
    ) -> None:
        """Launch a kernel, with as many registers a thread as it likes, or at most some.

        ``variant`` tells launches of one signature apart whose sizes differ.
        """
        compiled = self.compiled.get((id(kernel), variant))
        if compiled is None:
            options = {"num_warps": num_warps, "num_stages": num_stages}
            if most_registers is not None:
                options["maxnreg"] = most_registers
            # The interpreter has nothing to return.
            self.compiled[id(kernel), variant] = kernel[grid](*arguments, **constants, **options)
        else:
            compiled[(*grid, 1, 1)[:3]](*arguments, *constants.values())
