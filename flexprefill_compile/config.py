"""The settings of sparse prefill: checked when made, hashable, named as in the paper."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from typing import Any

from flexprefill_compile.torch_internals import PassesThroughDynamo

ESTIMATORS = ("flexprefill",)
ON_SKIP = ("keep", "raise")
KERNEL_BACKENDS = ("auto", "triton", "flash")


class InvalidOptionError(PassesThroughDynamo, ValueError):
    """An option has an unknown name or a value out of range."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsePrefillConfig:
    """What to select and where to rewrite; symbols as in FlexPrefill, arXiv 2502.20766.

    Attributes:
        gamma: Share of the attention that the selected blocks must reach, in (0, 1]. 1 is dense attention.
        tau: Distance below which a head's pooled estimate is trusted, in [0, 1]: the square root of a
            Jensen-Shannon divergence in nats. 0 makes every head vertical-slash.
        min_budget: Tokens that every query row computes at least, beside the first key block and the diagonal.
        max_budget: Tokens that every query row computes at most, beside the first key block and the diagonal;
            None is no limit. It also caps gamma = 1.
        block_size: Tokens to a side of a block: a power of two from 16 to 512.
        min_length: Prompts of fewer tokens keep dense attention. None is where sparse prefill starts to pay on the
            device, see ``crossing``.
        max_density: Share of the causal blocks above which a call runs dense after all, in (0, 1], decided at run
            time by reading one number from the device; 1 is never. None is what was measured for the device, see
            ``crossing``. Given, it holds at every length, and ``min_length``, if None, is where reading costs nothing.
            Plain causal attention only, and not under CUDA graphs, which can't decide.
        max_mask_elements: Attention under a mask tensor that the model is given, of more elements than this, stays
            dense. Masks that the model computes from positions and lengths are never read and have no limit.
        check_masks: Compare each mask with the formula it was turned into, at run time, and raise where they differ.
            For debugging: it needs the whole mask.
        estimator: How blocks are chosen: ``"flexprefill"``.
        on_skip: What to do about an attention call that has to stay dense: ``"keep"`` it and report it, or
            ``"raise"``. Decode steps and short prompts are dense by design and never raise.
        kernel_backend: What FlexAttention runs on a GPU: its ``"triton"`` template, ``"flash"``, the kernels of
            flash-attn-4, or ``"auto"``: flash where it is installed and fits. Asked for, calls that flash doesn't fit
            stay dense, with the reason.
        kernel_options: FlexAttention's own, names and values, over those chosen here: a mapping, kept as its items.

    Raises:
        InvalidOptionError: A value is out of range. It is a ``ValueError``.
    """

    gamma: float = 0.95
    tau: float = 0.1
    min_budget: int = 1024
    max_budget: int | None = None
    block_size: int = 128
    min_length: int | None = None
    max_density: float | None = None
    max_mask_elements: int = 2**26
    check_masks: bool = False
    estimator: str = "flexprefill"
    on_skip: str = "keep"
    kernel_backend: str = "auto"
    kernel_options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        _check("gamma", self.gamma, "in (0, 1]", _is_number(self.gamma) and 0 < self.gamma <= 1)
        _check("tau", self.tau, "in [0, 1]", _is_number(self.tau) and 0 <= self.tau <= 1)
        _check("min_budget", self.min_budget, "a number of tokens, at least 0", _is_integer(self.min_budget, 0))
        _check(
            "max_budget",
            self.max_budget,
            f"None or a number of tokens, at least min_budget ({self.min_budget})",
            self.max_budget is None or _is_integer(self.max_budget, max(1, self.min_budget)),
        )
        _check(
            "block_size",
            self.block_size,
            "a power of two from 16 to 512",
            _is_integer(self.block_size, 16) and self.block_size <= 512 and self.block_size.bit_count() == 1,
        )
        _check(
            "min_length",
            self.min_length,
            "None or a number of tokens, at least 1",
            self.min_length is None or _is_integer(self.min_length, 1),
        )
        _check(
            "max_density",
            self.max_density,
            "None or a share of the blocks in (0, 1]",
            self.max_density is None or (_is_number(self.max_density) and 0 < self.max_density <= 1),
        )
        _check(
            "max_mask_elements",
            self.max_mask_elements,
            "a number of elements, at least 0",
            _is_integer(self.max_mask_elements, 0),
        )
        _check("check_masks", self.check_masks, "True or False", isinstance(self.check_masks, bool))
        _check("estimator", self.estimator, f"one of {', '.join(ESTIMATORS)}", self.estimator in ESTIMATORS)
        _check(
            "kernel_backend",
            self.kernel_backend,
            f"one of {', '.join(KERNEL_BACKENDS)}",
            self.kernel_backend in KERNEL_BACKENDS,
        )
        items = self.kernel_options.items() if isinstance(self.kernel_options, Mapping) else self.kernel_options
        are_names = isinstance(items, Collection) and all(
            isinstance(item, tuple) and isinstance(item[0], str) for item in items
        )
        _check("kernel_options", self.kernel_options, "a mapping of FlexAttention's kernel options", are_names)
        object.__setattr__(self, "kernel_options", tuple(sorted(items)))
        _check("on_skip", self.on_skip, f"one of {', '.join(ON_SKIP)}", self.on_skip in ON_SKIP)


@dataclasses.dataclass(frozen=True)
class DensityCeiling:
    """When plain causal attention that turns out not to be sparse runs dense.

    Attributes:
        max_density: The largest share of the causal blocks that runs sparse.
        from_length: Shorter prompts, in tokens, run sparse whatever they select.
    """

    max_density: float
    from_length: int


def split_options(
    options: Mapping[str, Any] | None, inductor_names: Collection[str]
) -> tuple[SparsePrefillConfig, dict[str, Any]]:
    """Split the ``options`` of ``torch.compile`` into ours, checked, and inductor's, as they are.

    Args:
        options: Names and values as the user gave them; None for none.
        inductor_names: The names that inductor takes.

    Raises:
        InvalidOptionError: A name belongs to neither, or a value of ours is out of range.
    """
    own_names = [field.name for field in dataclasses.fields(SparsePrefillConfig)]
    own: dict[str, Any] = {}
    forwarded: dict[str, Any] = {}
    for given_name, value in (options or {}).items():
        name = given_name.replace("-", "_")
        if name in own_names:
            own[name] = value
        elif name in inductor_names:
            forwarded[name] = value
        else:
            close = difflib.get_close_matches(name, own_names, n=1)
            known = f"did you mean {close[0]!r}?" if close else f"flexprefill takes {', '.join(own_names)}"
            raise InvalidOptionError(f"{given_name!r} is an option of neither flexprefill nor inductor: {known}")
    return SparsePrefillConfig(**own), forwarded


def _check(name: str, value: object, expected: str, is_valid: bool) -> None:
    if not is_valid:
        raise InvalidOptionError(f"{name} must be {expected}, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: object, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least
