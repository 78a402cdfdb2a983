"""What a model predicts with dense attention and with sparse: loss, agreement, divergence."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional as F

# How many logits are held as float32 at once, in each of a few copies.
_LOGITS_AT_ONCE = 2**25
_LOSS_CHUNK_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class PredictionComparison:
    """How the next-token predictions of sparse prefill differ from those of dense.

    Attributes:
        num_tokens: Predicted tokens, those that the figures are over.
        dense_loss: Mean negative log-likelihood of the text's tokens, nats.
        sparse_loss: The same of the sparse prefill.
        agreement: Share of positions at which the most likely token is the same.
        divergence: Mean KL divergence of the sparse distribution from the dense, KL(dense || sparse), nats.
    """

    num_tokens: int
    dense_loss: float
    sparse_loss: float
    agreement: float
    divergence: float

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity with sparse attention over that with dense; above 1 is what was lost."""
        return math.exp(self.sparse_loss - self.dense_loss)


def compare_predictions(
    dense_logits: Tensor, sparse_logits: Tensor, tokens: Tensor, is_counted: Tensor | None = None
) -> PredictionComparison:
    """Compare what two prefills of the same tokens predict. Waits for the device.

    The logits are read a few rows at a time, in float32; nothing else has their size.

    Args:
        dense_logits: (B, S, vocabulary), any float dtype; row i predicts token i + 1.
        sparse_logits: Likewise; the two may be on different devices.
        tokens: (B, S) int64.
        is_counted: (B, S), false or 0 for tokens that are padding; None counts all.

    Raises:
        ValueError: The shapes don't fit, or no token is predicted.
    """
    if dense_logits.shape != sparse_logits.shape or dense_logits.shape[:2] != tokens.shape:
        raise ValueError(
            "logits must be (batch, tokens, vocabulary) of the same tokens, got "
            f"{tuple(dense_logits.shape)} and {tuple(sparse_logits.shape)} for tokens of {tuple(tokens.shape)}"
        )
    counted = torch.ones_like(tokens, dtype=torch.bool) if is_counted is None else is_counted.bool().to(tokens.device)
    predicts = (counted[:, :-1] & counted[:, 1:]).cpu()
    num_tokens = int(predicts.sum())
    if num_tokens == 0:
        raise ValueError("no token is predicted: the text must be of two tokens at least, beside its padding")

    totals = torch.zeros(4, dtype=torch.float64)
    rows_at_once = max(1, _LOGITS_AT_ONCE // dense_logits.shape[-1])
    for row, row_predicts in enumerate(predicts):
        for positions in row_predicts.nonzero().squeeze(-1).split(rows_at_once):
            totals += _compare_rows(dense_logits[row], sparse_logits[row], tokens[row], positions)
    dense_loss, sparse_loss, agreement, divergence = (totals / num_tokens).tolist()
    return PredictionComparison(num_tokens, dense_loss, sparse_loss, agreement, divergence)


def _compare_rows(dense_logits: Tensor, sparse_logits: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
    """Sum over some positions of one text: dense loss, sparse loss, agreement, divergence; (4,) float64."""
    device = sparse_logits.device
    targets = tokens.to(device)[positions.to(device) + 1].unsqueeze(-1)
    dense, sparse = (
        logits[positions.to(logits.device)].to(device, torch.float32).log_softmax(-1)
        for logits in (dense_logits, sparse_logits)
    )
    losses = [-scores.gather(-1, targets).double().sum() for scores in (dense, sparse)]
    agreement = (dense.argmax(-1) == sparse.argmax(-1)).double().sum()
    # A token that the dense model rules out, of logit -inf, adds nothing.
    terms = torch.where(dense == -torch.inf, 0, dense.exp() * (dense - sparse))
    return torch.stack([*losses, agreement, terms.sum(-1).double().sum()]).cpu()


def sum_loss(logits: Tensor, tokens: Tensor) -> float:
    """Sum the negative log-likelihood of each token given those before it, nats; waits for the device.

    Args:
        logits: (S, vocabulary).
        tokens: (S,) int64.
    """
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for chunk, targets in zip(logits[:-1].split(_LOSS_CHUNK_TOKENS), tokens[1:].split(_LOSS_CHUNK_TOKENS), strict=True):
        total += F.cross_entropy(chunk.float(), targets, reduction="none").double().sum()
    return total.item()
