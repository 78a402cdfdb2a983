"""How well a prefill serves what follows: the log-likelihood of the right answer, and whether it would be given.

The prompt is prefilled, dense or sparse. The answer's tokens are then decoded, densely, on the cache that the prefill
left, as ``generate`` does: here in one call, with the right tokens given.

    prompt -> prefill -> last logits -> answer's first token
                |
              cache -> decode, dense -> answer's other tokens
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from .sample import Sample

# Tokens at the end of a text that are scored, at most; at most half of the shortest text.
_TEXT_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class Score:
    """How one sample went.

    Attributes:
        log_likelihood: Mean over the tokens scored, nats.
        accuracy: For an answer 1 if greedy decoding would give all of it, else 0; for a text the share of tokens that
            were the most likely ones.
    """

    log_likelihood: float
    accuracy: float


def score_sample(prefill: Callable[..., Any], model: Any, sample: Sample, text_tokens: int) -> Score:
    """Prefill a sample's prompt and score what follows, or the end of the prompt itself where nothing follows.

    All samples ask for as many logits, so that one compiled graph serves every task. Waits for the device.

    Args:
        prefill: The model as it prefills: compiled, or as it is.
        model: The model as it is, for the decode steps.
        sample: Its prompt has more tokens than ``text_tokens``.
        text_tokens: How many tokens at the end of a text to score.

    Raises:
        UsageError: The model keeps no cache to decode from, so it is no causal language model.
    """
    prompt = torch.tensor([sample.prompt], device=model.device)
    with torch.no_grad():
        output = prefill(prompt, use_cache=True, logits_to_keep=text_tokens + 1)
        if not sample.answer:
            return _score_tokens(output.logits[0, -text_tokens - 1 : -1], prompt[0, -text_tokens:])
        if getattr(output, "past_key_values", None) is None:
            raise UsageError(f"model must be a causal language model with a cache, got {type(model).__name__}")
        answer = torch.tensor([sample.answer], device=model.device)
        logits = output.logits[0, -1:]
        if answer.shape[1] > 1:
            rest = model(answer[:, :-1], past_key_values=output.past_key_values, use_cache=True)
            logits = torch.cat([logits, rest.logits[0]])
        score = _score_tokens(logits, answer[0])
        return dataclasses.replace(score, accuracy=float(score.accuracy == 1))


def count_text_tokens(samples: Iterable[Sample]) -> int:
    """Return how many tokens at the end of a text are scored: as many for every length, so that they compare."""
    return min(_TEXT_TOKENS, min(len(sample.prompt) for sample in samples) // 2)


def _score_tokens(logits: Tensor, targets: Tensor) -> Score:
    """Score tokens by the logits that predict them: (N, vocabulary) floating point, (N,) int64."""
    log_likelihoods = logits.float().log_softmax(-1).gather(-1, targets[:, None])
    is_right = logits.argmax(-1) == targets
    return Score(log_likelihoods.mean().item(), is_right.double().mean().item())
