"""The settings of sparse prefill: checked when made, hashable, named as in the paper."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .checks import (
    InvalidOptionError,
    check,
    check_budgets,
    check_tau,
    is_integer,
    is_number,
    resolve_gamma,
)
from .policy import Policy, resolve_policy
from .rank_groups import RankGroup, resolve_rank_group
from .registry import Estimator, check_estimator, find_defaults, name_estimator

__all__ = ["InvalidOptionError", "SparsePrefillConfig", "split_options"]

_ON_SKIP = ("keep", "raise")
KERNEL_BACKENDS = ("auto", "triton", "flash")
# A floor that follows the length: a token in so many of the context, between the two numbers of tokens.
_CONTEXT_PER_FLOOR, _FLOORS = 16, (768, 1024)
# The fields that say which blocks to select, gamma first, with their types in the schemas of the ops that select.
SELECTION = {
    "gamma": "float[]",
    "tau": "float",
    "min_budget": "int?",
    "max_budget": "int?",
    "block_size": "int",
    "dense_last": "int",
    "estimator": "str",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsePrefillConfig:
    """What to select and where to rewrite; symbols as in FlexPrefill, arXiv 2502.20766.

    Attributes:
        gamma: Share of the attention that the selected blocks must reach, in (0, 1]. 1 is dense attention.
            One number, or one for each query head. None is the estimator's default: for ``"pooled"`` 0.8, on a
            CPU 0.97, else 0.95.
        tau: Distance below which a head's pooled estimate is trusted, in [0, 1]: the square root of a
            Jensen-Shannon divergence in nats. 0 makes every head vertical-slash.
        min_budget: Tokens that every query row computes at least, beside the first key block and the diagonal. None is
            the estimator's default: a 16th of the context for ``"pooled"``, within 768 and 1024, else 1024.
        max_budget: Tokens that every query row computes at most, beside the first key block and the diagonal;
            None is no limit. It also caps gamma = 1 and ``dense_last``.
        block_size: Tokens to a side of a block: a power of two from 16 to 512. Where it isn't given, the backend takes
            64 for ``"pooled"`` on a GPU by FlexAttention's Triton template.
        min_length: Prompts of fewer tokens keep dense attention. None is the break-even length of the
            device, see ``device_defaults``.
        max_density: Share of the causal blocks above which a call runs dense after all, in (0, 1], decided at run
            time by reading one number from the device; 1 is never. None is what was measured for the device, see
            ``device_defaults``. Given, it holds at every length, and ``min_length``, if None, is where reading costs
            nothing.
            Plain causal attention only, and not under CUDA graphs, which can't decide.
        max_mask_elements: Attention under a mask tensor that the model is given, of more elements than this, stays
            dense. Masks that the model computes from positions and lengths are never read and have no limit.
        check_masks: Compare each mask with the formula it was turned into, at run time, and raise where they differ.
            For debugging: it needs the whole mask.
        estimator: How blocks are chosen: by name, ``"pooled"``, ``"flexprefill"``, ``"auto"``, ``"xattention"``,
            ``"sampled"``, ``"streaming"``, ``"dense"`` or one that was registered; or a function, which is registered
            and kept by its qualified name. See docs/estimators.md.
        dense_last: The blocks of the last so many queries of a prompt, or of a chunk of it, compute every block.
        dense_layers: Attention layers that stay dense, by number: the first number in the path of the module, as 3 in
            ``model.layers.3.self_attn``. Refused where a path has none.
        policy: Settings by layer, over those here: a ``Policy``, the path of its file, or None.
        on_skip: What to do about an attention call that has to stay dense: ``"keep"`` it and report it, or
            ``"raise"``. Decode steps and short prompts are dense by design and never raise.
        kernel_backend: What FlexAttention runs on a GPU: its ``"triton"`` template, ``"flash"``, the kernels of
            flash-attn-4, or ``"auto"``: flash where it is installed and fits. Asked for, calls that flash doesn't fit
            stay dense, with the reason.
        kernel_options: FlexAttention's own, names and values, over those chosen here: a mapping, kept as its items.
        sequence_parallel: The ranks over which a prompt is spread, each with a stretch of equal length: a
            ``ProcessGroup``, a ``DeviceMesh`` of one dimension, or a mesh and the name of a dimension. The pass then
            exchanges heads for tokens around every attention call. See docs/many-gpus.md.
        tensor_parallel: The ranks over which each layer's heads are sharded, likewise. The model does that itself;
            the option tells which heads a rank holds, for policies and gammas by head.

    Raises:
        InvalidOptionError: A value is out of range. It is a ``ValueError``.
    """

    gamma: float | tuple[float, ...] | None = None
    tau: float = 0.1
    min_budget: int | None = None
    max_budget: int | None = None
    block_size: int = 128
    min_length: int | None = None
    max_density: float | None = None
    max_mask_elements: int = 2**26
    check_masks: bool = False
    estimator: str | Estimator = "pooled"
    dense_last: int = 0
    dense_layers: tuple[int, ...] = ()
    policy: Policy | str | Path | None = None
    on_skip: str = "keep"
    kernel_backend: str = "auto"
    kernel_options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()
    sequence_parallel: RankGroup | Any = None
    tensor_parallel: RankGroup | Any = None

    def __post_init__(self) -> None:
        if callable(self.estimator):
            object.__setattr__(self, "estimator", name_estimator(self.estimator))
        check_estimator(self.estimator)
        if self.gamma is not None:
            object.__setattr__(self, "gamma", resolve_gamma(self.gamma))
        check_tau(self.tau)
        check_budgets(self.min_budget, self.max_budget)
        check(
            "block_size",
            self.block_size,
            "a power of two from 16 to 512",
            is_integer(self.block_size, 16) and self.block_size <= 512 and self.block_size.bit_count() == 1,
        )
        check(
            "min_length",
            self.min_length,
            "None or a number of tokens, at least 1",
            self.min_length is None or is_integer(self.min_length, 1),
        )
        check(
            "max_density",
            self.max_density,
            "None or a share of the blocks in (0, 1]",
            self.max_density is None or (is_number(self.max_density) and 0 < self.max_density <= 1),
        )
        check(
            "max_mask_elements",
            self.max_mask_elements,
            "a number of elements, at least 0",
            is_integer(self.max_mask_elements, 0),
        )
        check("check_masks", self.check_masks, "True or False", isinstance(self.check_masks, bool))
        check("dense_last", self.dense_last, "a number of tokens, at least 0", is_integer(self.dense_last, 0))
        are_layers = isinstance(self.dense_layers, Collection) and all(is_integer(n, 0) for n in self.dense_layers)
        check("dense_layers", self.dense_layers, "numbers of layers, each at least 0", are_layers)
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        object.__setattr__(self, "policy", resolve_policy(self.policy))
        check(
            "kernel_backend",
            self.kernel_backend,
            f"one of {', '.join(KERNEL_BACKENDS)}",
            self.kernel_backend in KERNEL_BACKENDS,
        )
        items = self.kernel_options.items() if isinstance(self.kernel_options, Mapping) else self.kernel_options
        are_names = isinstance(items, Collection) and all(
            isinstance(item, tuple) and isinstance(item[0], str) for item in items
        )
        check("kernel_options", self.kernel_options, "a mapping of FlexAttention's kernel options", are_names)
        object.__setattr__(self, "kernel_options", tuple(sorted(items)))
        check("on_skip", self.on_skip, f"one of {', '.join(_ON_SKIP)}", self.on_skip in _ON_SKIP)
        for name in ("sequence_parallel", "tensor_parallel"):
            object.__setattr__(self, name, resolve_rank_group(name, getattr(self, name)))

    def as_options(self) -> dict[str, Any]:
        """Return the config as the ``options`` of ``torch.compile``: what differs from the defaults."""
        fields = dataclasses.fields(self)
        return {field.name: getattr(self, field.name) for field in fields if getattr(self, field.name) != field.default}

    @property
    def gammas(self) -> list[float]:
        """Gamma as the ops take it: one number, or one for each query head."""
        gamma = find_defaults(self.estimator).gamma if self.gamma is None else self.gamma
        return list(gamma) if isinstance(gamma, tuple) else [gamma]

    def floor_at(self, length: int) -> int:
        """Return the tokens that a query row computes at least in a context of ``length`` tokens."""
        if self.min_budget is not None:
            return self.min_budget
        floor = find_defaults(self.estimator).min_budget
        if floor is None:
            shortest, longest = _FLOORS
            floor = min(max(length // _CONTEXT_PER_FLOOR, shortest), longest)
        # A ceiling below the default floor wins: only a floor that was asked for contradicts it.
        return floor if self.max_budget is None else min(floor, self.max_budget)

    @property
    def is_dense(self) -> bool:
        """Whether every block is computed, whatever the inputs."""
        return self.max_budget is None and (min(self.gammas) == 1 or find_defaults(self.estimator).is_dense)

    @property
    def selection(self) -> tuple[Any, ...]:
        """The fields of ``SELECTION``, as the selecting ops take them last; ``from_selection`` is the way back."""
        return tuple(self.gammas if name == "gamma" else getattr(self, name) for name in SELECTION)

    @staticmethod
    def from_selection(gammas: list[float], *others: Any) -> SparsePrefillConfig:
        """Return the config of which these are the ``selection``."""
        return _recall_config(tuple(gammas), *others)


def check_config(config: object) -> None:
    """Check what a function takes as its config.

    Raises:
        InvalidOptionError: It is no ``SparsePrefillConfig``.
    """
    expected = "a SparsePrefillConfig, as SparsePrefillConfig(gamma=0.9)"
    check("config", config, expected, isinstance(config, SparsePrefillConfig))


@functools.lru_cache(maxsize=1024)
def _recall_config(gammas: tuple[float, ...], *others: Any) -> SparsePrefillConfig:
    """Make the config, and check it, once: that takes as long as launching a kernel."""
    gamma = gammas[0] if len(gammas) == 1 else gammas
    return SparsePrefillConfig(**dict(zip(SELECTION, (gamma, *others), strict=True)))


@dataclasses.dataclass(frozen=True)
class DensityCeiling:
    """When plain causal attention that turns out not to be sparse runs dense.

    Attributes:
        max_density: The largest share of the causal blocks that runs sparse.
        from_length: Shorter prompts, in tokens, run sparse whatever they select.
        binds_flash: Whether calls that run flash-attn-4's kernels have it too.
    """

    max_density: float
    from_length: int
    binds_flash: bool = True


def split_options(
    options: Mapping[str, Any] | None, inductor_names: Collection[str]
) -> tuple[SparsePrefillConfig, dict[str, Any]]:
    """Split the ``options`` of ``torch.compile`` into ours, checked, and inductor's, as they are.

    Args:
        options: Names and values as the user gave them; None for none.
        inductor_names: The names that inductor takes.

    Raises:
        InvalidOptionError: They are no mapping of names, a name belongs to neither, or a value of ours is out of range.
    """
    are_named = options is None or (isinstance(options, Mapping) and all(isinstance(name, str) for name in options))
    check("options", options, 'a mapping of names to values, as {"gamma": 0.9}', are_named)
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
