"""Launching Triton kernels again without working out anew what to compile: that takes longer than short prompts do."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import triton

_MOST_SIGNATURES = 1024

_T = TypeVar("_T")
_compiled: dict[Any, dict[Any, Any]] = {}
_logger = logging.getLogger(__name__)


# Triton's own functions of these names take microseconds each, as constants may be given to them too.
def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least ``n``, which is at least 1."""
    return 1 << (n - 1).bit_length()


def run_first_that_fits(variants: Iterable[Callable[[], _T]], what: str) -> _T | None:
    """Run the first variant whose tiles fit the GPU; where none does, warn and return None.

    Args:
        variants: The same computation with smaller and smaller tiles.
        what: What plain PyTorch then does, for the warning: "blocks are ...".
    """
    failure: Exception | None = None
    for variant in variants:
        try:
            return variant()
        except triton.OutOfResources as error:
            failure = error
    _logger.warning("%s by plain PyTorch, slower: %s", what, failure)
    return None


class Launcher:
    """Launches kernels on inputs of one signature.

    Args:
        signature: All that Triton compiles for: devices, dtypes, shapes, strides, alignments, settings. Constants and
            sizes must follow from it.
    """

    def __init__(self, signature: Hashable) -> None:
        if len(_compiled) >= _MOST_SIGNATURES and signature not in _compiled:
            _compiled.clear()
        self.compiled = _compiled.setdefault(signature, {})

    def run(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: dict[str, Any],
        *,
        num_warps: int,
        num_stages: int = 3,
        most_registers: int | None = None,
        variant: Hashable = None,
    ) -> None:
        """Launch a kernel.

        Args:
            kernel: A Triton kernel.
            grid: How many programs run along each of up to three axes.
            arguments: All of the kernel's arguments by name, constants too, in any order.
            num_warps: As Triton's.
            num_stages: As Triton's.
            most_registers: The most registers a thread may have; None leaves it to the compiler.
            variant: Tells launches of one signature apart whose sizes differ.
        """
        entry = self.compiled.get((id(kernel), variant))
        if entry is None:
            options = {"num_warps": num_warps, "num_stages": num_stages}
            if most_registers is not None:
                options["maxnreg"] = most_registers
            compiled = kernel[grid](**arguments, **options)
            if compiled is not None:  # the interpreter returns nothing
                self.compiled[id(kernel), variant] = compiled, operator.itemgetter(*kernel.arg_names)
        else:
            compiled, in_order = entry
            compiled[(*grid, 1, 1)[:3]](*in_order(arguments))
