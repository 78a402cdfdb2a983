"""What the passes did to each attention call, and why, as data."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable

from .text_table import format_table
from .torch_internals import PassesThroughDynamo


class SkipReason(enum.Enum):
    """Why an attention call stayed dense; the value says it in words."""

    DECODE = "one query: a decode step"
    TOO_SHORT = "prompt shorter than min_length"
    DENSE_LAYER = "layer set to stay dense"
    MASK_NOT_LIFTED = "its mask is no formula of query and key"
    MASK_EDITED = "its mask is edited in place"
    NOT_CAUSAL = "not causal"
    UNRECOGNISED = "attention written out in a form that is not recognised"
    FUSED = "projections and attention in one call, as nn.MultiheadAttention and nn.TransformerEncoderLayer make it"
    KERNEL_CALLED = "an attention kernel called by its own name, not scaled_dot_product_attention"
    WEIGHTS_USED = "its attention weights or logsumexp are used, not its output alone"
    DROPOUT = "has dropout"
    GRADIENT = "under autograd; sparse prefill is inference only, use torch.no_grad()"
    LENGTHS_DIFFER = "query and key lengths differ, or can't be compared"
    SHAPE = "not (B, H, S, D) with query heads a multiple of key heads"
    HEAD_DIM = "head dimension below FlexAttention's smallest"
    DTYPE = "dtype that FlexAttention doesn't take"
    DEVICE = "device other than CPU and CUDA"
    TENSOR_SUBCLASS = "a tensor subclass, or not known to be a tensor"
    KERNEL = "kernel_backend is flash, which doesn't fit"
    LOWERING_FAILED = "inductor failed on the sparse form"

    @property
    def is_by_design(self) -> bool:
        """Whether dense attention is the right choice here, so that ``on_skip="raise"`` lets it pass."""
        return self in {SkipReason.DECODE, SkipReason.TOO_SHORT, SkipReason.DENSE_LAYER}


@dataclasses.dataclass(frozen=True)
class AttentionShapes:
    """The sizes of one attention call, as text: symbolic ones by their symbols."""

    query: str
    key: str
    dtype: str


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """An attention call that runs sparse now.

    Attributes:
        name: Where it stands in the model, as in ``model.get_submodule``.
        shapes: Its sizes.
        misses_flash: Whether flash-attn-4's kernels would run it, were they installed.
    """

    name: str
    shapes: AttentionShapes
    misses_flash: bool = False

    rewritten = True
    reason = None
    detail = ""


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An attention call that stayed dense.

    Attributes:
        name: Where it stands in the model, as in ``model.get_submodule``.
        shapes: Its sizes, as far as they are known.
        reason: Why.
        detail: The value that decided, or the error of a lowering that failed.
    """

    name: str
    shapes: AttentionShapes
    reason: SkipReason
    detail: str = ""

    rewritten = False


Site = Rewritten | Skipped


@dataclasses.dataclass(frozen=True)
class RewriteReport:
    """Every attention call that was compiled, in the order of the graphs; ``str()`` is a table."""

    sites: tuple[Site, ...] = ()

    @property
    def num_rewritten(self) -> int:
        """How many calls run sparse."""
        return sum(site.rewritten for site in self.sites)

    def __str__(self) -> str:
        """Return a line for each attention call, then the total."""
        if not self.sites:
            return "no attention was compiled"
        rows = [
            (site.name, site.shapes.query, site.shapes.key, site.shapes.dtype, _outcome(site)) for site in self.sites
        ]
        table = format_table(("attention call", "query", "key", "dtype", "outcome"), rows)
        total = f"{self.num_rewritten} of {len(self.sites)} attention calls rewritten"
        return "\n".join([table, total, *self._list_hints()])

    def _list_hints(self) -> list[str]:
        num_calls = sum(isinstance(site, Rewritten) and site.misses_flash for site in self.sites)
        hint = f"flash-attn-4 would run {num_calls} of them faster: pip install 'flexprefill-compile[flash]'"
        return [hint] if num_calls else []


class AttentionSkippedError(PassesThroughDynamo, RuntimeError):
    """``on_skip="raise"`` and an attention call has to stay dense.

    Attributes:
        site: The call.
    """

    def __init__(self, site: Skipped) -> None:
        super().__init__(f"on_skip='raise', and attention call {site.name} stays {_outcome(site)}")
        self.site = site


def check_skips(sites: Iterable[Site]) -> None:
    """Raise if an attention call stayed dense for want of support.

    Raises:
        AttentionSkippedError: Names the first such call and its reason.
    """
    for site in sites:
        if isinstance(site, Skipped) and not site.reason.is_by_design:
            raise AttentionSkippedError(site)


def _outcome(site: Site) -> str:
    if isinstance(site, Rewritten):
        return "rewritten"
    return f"dense: {site.reason.value}" + (f" ({site.detail})" if site.detail else "")
