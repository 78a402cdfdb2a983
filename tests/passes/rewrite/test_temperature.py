"""A scale that is data, of the model, of heads or of queries: the queries are multiplied by it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.checked_attention import without_code_generation
from torch import Tensor

from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.report import SkipReason

LENGTH = 100
Scale = Callable[[Tensor, Tensor], Tensor]


def attend(scale: Scale, cap: bool = False) -> Callable[..., Tensor]:
    def call(query: Tensor, key: Tensor, value: Tensor, factor: Tensor) -> Tensor:
        scores = scale(query @ key.mT, factor)
        scores = torch.tanh(scores / 5) * 5 if cap else scores
        hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value

    return call


SCALES: dict[str, tuple[Scale, Tensor]] = {
    "a number": (lambda scores, factor: scores * factor, torch.tensor(0.3)),
    "a divisor": (lambda scores, factor: scores / factor, torch.tensor(4.0)),
    "on the left": (lambda scores, factor: factor * scores * 0.5, torch.tensor([0.3])),
    "a square root": (lambda scores, factor: scores / factor.sqrt(), torch.tensor(16.0)),
    "of heads": (lambda scores, factor: scores * factor.clamp(max=4).exp(), torch.randn(2, 1, 1)),
    "of queries": (lambda scores, factor: scores * factor[:, None], torch.rand(LENGTH)),
}


@pytest.mark.parametrize("cap", [False, True])
@pytest.mark.parametrize(("scale", "factor"), SCALES.values(), ids=SCALES)
def test_it_runs_sparse(scale: Scale, factor: Tensor, cap: bool) -> None:
    query, key, value = torch.randn(3, 2, 2, LENGTH, 16)
    call, backend = attend(scale, cap), FlexPrefillBackend()
    options = {"gamma": 1.0, "min_length": 64, "block_size": 32}
    with torch.no_grad(), without_code_generation():
        actual = torch.compile(call, backend=backend, options=options)(query, key, value, factor)
    assert backend.report.num_rewritten == 1, str(backend.report)
    torch.testing.assert_close(actual, call(query, key, value, factor))


def test_it_does_in_generated_code() -> None:
    query, key, value = torch.randn(3, 1, 2, LENGTH, 16)
    scale, factor = SCALES["a number"]
    call, backend = attend(scale), FlexPrefillBackend()
    with torch.no_grad():
        options = {"gamma": 1.0, "min_length": 64, "block_size": 32}
        actual = torch.compile(call, backend=backend, options=options)(query, key, value, factor)
        torch.testing.assert_close(actual, call(query, key, value, factor))
    assert backend.report.num_rewritten == 1, str(backend.report)


def test_a_factor_of_keys_stays_dense() -> None:
    query, key, value = torch.randn(3, 1, 2, LENGTH, 16)
    backend = FlexPrefillBackend()
    with torch.no_grad(), without_code_generation():
        call = torch.compile(
            attend(lambda scores, factor: scores * factor), backend=backend, options={"min_length": 64}
        )
        call(query, key, value, torch.rand(LENGTH))
    (site,) = backend.report.sites
    assert site.reason is SkipReason.MASK_NOT_LIFTED
    assert site.detail == "the scores go through more than scale, softcap, bias and mask"
