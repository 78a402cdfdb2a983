"""The table of estimators: one row each. A user's function has the row of a scoring estimator.

To add an estimator: write ``score_<name>`` in a file of its own, add a row here, and a row in docs/estimators.md.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from torch import Tensor

from flexprefill_compile.settings.config import SparsePrefillConfig
from flexprefill_compile.settings.registry import BuiltIn, register_built_in

from ..choice import Choice
from ..layout import BlockTables
from ..masks.facts import MaskFacts
from .auto import score_auto
from .fixed import choose_dense, choose_masked_dense, choose_masked_streaming, choose_streaming
from .flexprefill.causal_selection import choose_flexprefill
from .flexprefill.masked_representative import ScoreRule
from .flexprefill.masked_selection import choose_masked_flexprefill
from .inputs import EstimatorInputs
from .kernel_calls import select_flexprefill, select_masked_pooled, select_pooled
from .pooled import score_pooled
from .sampled import score_sampled
from .scoring import Choose, Score, choose_by_score, choose_masked_by_score, score_by_user, select_by_score
from .xattention import score_xattention

_ChooseMasked = Callable[[EstimatorInputs, MaskFacts, ScoreRule, SparsePrefillConfig], Choice]
_SelectByKernels = Callable[[Tensor, Tensor, Tensor | None, float, SparsePrefillConfig, int], BlockTables | None]
_SelectMaskedByKernels = Callable[
    [Tensor, Tensor, Tensor | None, MaskFacts, float, float | None, SparsePrefillConfig], BlockTables | None
]


@dataclasses.dataclass(frozen=True)
class EstimatorRow(BuiltIn):
    """One estimator.

    Attributes:
        name: What ``SparsePrefillConfig.estimator`` calls it.
        is_dense: Whether it keeps every block.
        choose: Chooses blocks of causal attention.
        choose_masked: Chooses blocks under a mask.
        select_by_kernels: Selects and packs blocks of causal attention on a GPU, from query, key, value, scale, config
            and the width of the indices; returns None where the kernels don't take the inputs. None for an estimator
            that reads neither queries nor keys.
        select_masked_by_kernels: The same under a mask, without a bias on the scores, from query, key, value, facts,
            scale, softcap and config. None for an estimator without such kernels.
        score: Returns block scores, (B, H, num_q_blocks, num_k_blocks), zero off the grid; None for an estimator that
            chooses without scores.
    """

    choose: Choose
    choose_masked: _ChooseMasked
    select_by_kernels: _SelectByKernels | None = None
    select_masked_by_kernels: _SelectMaskedByKernels | None = None
    score: Score | None = None


def _score_with(name: str, score: Score) -> EstimatorRow:
    """Return the row of an estimator that scores blocks."""
    return EstimatorRow(
        name=name,
        choose=functools.partial(choose_by_score, score),
        choose_masked=functools.partial(choose_masked_by_score, score),
        select_by_kernels=functools.partial(select_by_score, score),
        score=score,
    )


_ROWS = (
    dataclasses.replace(
        _score_with("pooled", score_pooled),
        select_by_kernels=select_pooled,
        select_masked_by_kernels=select_masked_pooled,
        gamma=0.8,
        cpu_gamma=0.97,
        min_budget=None,
        gpu_block_size=64,
    ),
    EstimatorRow(
        name="flexprefill",
        choose=choose_flexprefill,
        choose_masked=choose_masked_flexprefill,
        select_by_kernels=select_flexprefill,
    ),
    _score_with("auto", score_auto),
    _score_with("xattention", score_xattention),
    _score_with("sampled", score_sampled),
    EstimatorRow(name="streaming", choose=choose_streaming, choose_masked=choose_masked_streaming),
    EstimatorRow(name="dense", is_dense=True, choose=choose_dense, choose_masked=choose_masked_dense),
)
ESTIMATORS = {row.name: row for row in _ROWS}
for _row in _ROWS:
    register_built_in(_row)


def find_row(config: SparsePrefillConfig) -> EstimatorRow:
    """Return the row of the config's estimator, built in or a user's."""
    name = str(config.estimator)
    return ESTIMATORS.get(name) or _score_with(name, functools.partial(score_by_user, name))
