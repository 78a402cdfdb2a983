"""Show each attention call of a prefill to observers while it runs: the kernel of the op ``flexprefill::observe``.

The op stands in graphs that were compiled to be observed, see ``FlexPrefillBackend``. It takes all inputs of a call
and returns a copy of its output, so that no tensor is kept longer than the call lasts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flexprefill_compile.ops import OBSERVE

from .estimators.flexprefill.masked_representative import ScoreRule
from .layout import BlockTables
from .masks.facts import MaskFacts

# Fractional parts of its multiples spread evenly and don't line up with blocks.
_GOLDEN_RATIO = (5**0.5 - 1) / 2


class ObservedAttention(NamedTuple):
    """One attention call over selected blocks, and some of its rows in detail.

    Attributes:
        name: The call's place in the model.
        output: (B, H, Sq, Dv), its result.
        query: (B, H, Sq, D).
        key: (B, Hkv, Skv, D).
        value: (B, Hkv, Skv, Dv).
        tables: The blocks it computed.
        facts: Of its mask; None is plain causal attention.
        rule: From q.k to scores; its bias is that of the representative queries.
        rows: (R,) int64, some query rows in ascending order.
        visible: Broadcasts to (B, H, R, Skv), bool, the keys that the mask lets those rows see; None is causal.
        row_bias: Broadcasts likewise, what is added to their scores; None is nothing.
    """

    name: str
    output: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    tables: BlockTables
    facts: MaskFacts | None
    rule: ScoreRule
    rows: Tensor
    visible: Tensor | None
    row_bias: Tensor | None


Observer = Callable[[ObservedAttention], None]
_observers: list[Observer] = []


@contextlib.contextmanager
def observe_attention(observer: Observer) -> Iterator[None]:
    """Show every attention call that runs meanwhile, in a graph compiled to be observed, to ``observer``."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def sample_rows(count: int, length: int, device: torch.device) -> Tensor:
    """Choose rows spread over a prompt, one in each of ``count`` equal stretches, always the same ones.

    Returns:
        (min(count, length),) int64, ascending, all different.
    """
    count = torch.sym_min(count, length)
    stretch = torch.arange(count, dtype=torch.float64, device=device)
    rows: Tensor = ((stretch + (stretch * _GOLDEN_RATIO).frac()) * (length / count)).long()
    return rows


def _observe(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: list[Tensor],
    facts: list[Tensor],
    score_bias: Tensor | None,
    rows: Tensor,
    visible: Tensor | None,
    row_bias: Tensor | None,
    scale: float,
    softcap: float | None,
    name: str,
) -> Tensor:
    for observer in _observers:
        observer(
            ObservedAttention(
                name=name,
                output=output,
                query=query,
                key=key,
                value=value,
                tables=BlockTables(*tables),
                facts=MaskFacts(*facts) if facts else None,
                rule=ScoreRule(scale, softcap, score_bias),
                rows=rows,
                visible=visible,
                row_bias=row_bias,
            )
        )
    return output.clone()


torch.library.impl(OBSERVE, ("CPU", "CUDA"), _observe)
