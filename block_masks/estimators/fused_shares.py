"""Shares by Triton kernels: on a GPU, for causal attention of a prompt to itself, where there is Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .inputs import EstimatorInputs


def try_share_rows(inputs: EstimatorInputs, rows_per_block: int) -> Tensor | None:
    """Return what ``EstimatorInputs.share_of_rows`` does, from kernels, or None where they don't take the inputs."""
    return _try("share_rows", inputs, rows_per_block)


def try_share_antidiagonals(inputs: EstimatorInputs, stride: int) -> Tensor | None:
    """Return what ``score_antidiagonals`` does, from kernels, or None where they don't take the inputs."""
    return _try("share_antidiagonals", inputs, stride)


def _try(name: str, inputs: EstimatorInputs, number: int) -> Tensor | None:
    if not inputs.query.is_cuda:
        return None
    try:
        from ..kernels import shares as triton_shares  # noqa: PLC0415  (Triton is not on every platform)
    except ImportError:
        return None
    if not triton_shares.can_share(inputs):
        return None
    shares: Tensor | None = getattr(triton_shares, name)(inputs, number)
    return shares
