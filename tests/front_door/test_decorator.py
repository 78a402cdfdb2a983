"""@sparse_prefill on everything it takes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from helpers.models import OPTIONS, SelfAttention, causal_attention, relative_error
from torch import Tensor, nn

from flexprefill_compile import InvalidOptionError, sparse_prefill
from flexprefill_compile.backend import flexprefill

EXACT: dict[str, Any] = OPTIONS | {"gamma": 1.0}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(1, 100, 64)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (4, 16)).transpose(1, 2)


def assert_runs_sparse(actual: Tensor, expected: Tensor) -> None:
    assert [site.rewritten for site in flexprefill.report.sites] == [True]
    assert relative_error(actual, expected.double()) < 1e-6


def test_a_function_keeps_its_name_doc_and_signature(x: Tensor) -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend."""
        return causal_attention(query, key, value)

    compiled = sparse_prefill(**EXACT)(attend)
    assert (compiled.__name__, compiled.__doc__) == ("attend", "Attend.")
    assert inspect.signature(compiled) == inspect.signature(attend)
    q = heads(x)
    assert_runs_sparse(compiled(q, q, q), attend(q, q, q))


def test_a_method(x: Tensor) -> None:
    class Scorer:
        factor = 2.0

        @sparse_prefill(**EXACT)
        def score(self, q: Tensor) -> Tensor:
            """Score."""
            return self.factor * causal_attention(q, q, q)

    q = heads(x)
    assert (Scorer.score.__name__, Scorer.score.__doc__) == ("score", "Score.")
    assert_runs_sparse(Scorer().score(q), 2.0 * causal_attention(q, q, q))


def test_a_module_gives_one_of_its_class_with_its_parameters(x: Tensor) -> None:
    module = SelfAttention().eval()
    compiled = sparse_prefill(module, **EXACT)
    assert type(compiled) is SelfAttention
    assert inspect.signature(compiled.forward) == inspect.signature(module.forward)
    assert all(ours is theirs for ours, theirs in zip(compiled.parameters(), module.parameters(), strict=True))
    with torch.no_grad():
        expected = module(x)
        assert flexprefill.report.sites == (), "the module passed in stays as it is"
        assert_runs_sparse(compiled(x), expected)


def test_a_class_of_modules(x: Tensor) -> None:
    @sparse_prefill(**EXACT)
    class Attention(nn.Module):
        """Attention."""

        def forward(self, x: Tensor) -> Tensor:
            q = heads(x)
            return causal_attention(q, q, q)

    assert (Attention.__name__, Attention.__doc__) == ("Attention", "Attention.")
    q = heads(x)
    assert_runs_sparse(Attention()(x), causal_attention(q, q, q))


def test_without_arguments_short_prompts_stay_dense(x: Tensor) -> None:
    @sparse_prefill
    def attend(q: Tensor) -> Tensor:
        return causal_attention(q, q, q)

    attend(heads(x))
    assert [site.rewritten for site in flexprefill.report.sites] == [False]


def test_a_bad_option_is_refused_when_decorating() -> None:
    with pytest.raises(InvalidOptionError, match=r"^gamma must be in \(0, 1\], got 0$"):
        sparse_prefill(gamma=0)
    with pytest.raises(InvalidOptionError, match="'blocksize' is an option of neither"):
        sparse_prefill(causal_attention, blocksize=64)


@pytest.mark.parametrize("target", [3, "model", int])
def test_what_can_not_be_compiled_is_refused(target: Any) -> None:
    with pytest.raises(TypeError, match="sparse_prefill compiles a function"):
        sparse_prefill(target)
