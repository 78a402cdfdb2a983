"""A slice of the campaign, the same each time, and what the campaign must be able to see."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from helpers.checked_attention import attend_checked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexprefill_compile.passes.rewrite import attention as rewrite_attention

from . import check
from .check import Outcome, run_case
from .grammar.case import draw_case
from .grammar.choices import Choices, replayed, seeded, shrink


def assert_right(outcome: Outcome, source: str) -> None:
    assert not outcome.is_failure, f"{outcome.message}\n{source}"


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_attention_as_users_write_it_is_right(data: st.DataObject) -> None:
    case = draw_case(Choices(lambda below: data.draw(st.integers(0, below - 1))))
    assert_right(run_case(case), case.source)


@pytest.mark.parametrize("number", range(30))
def test_seeded_cases_are_right(number: int) -> None:
    case = draw_case(seeded(0, number))
    assert_right(run_case(case), case.source)


@pytest.mark.parametrize("number", range(3))
def test_generated_code_is_right(number: int) -> None:
    case = draw_case(seeded(1, number))
    assert_right(run_case(case, has_code=True), case.source)


def test_a_wrong_number_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(*arguments: Any, **keywords: Any) -> tuple[Tensor, ...]:
        output, *others = attend_checked(*arguments, **keywords)
        return (output + 1e-3, *others)

    case = draw_case(replayed([]))
    assert_right(run_case(case), case.source)
    monkeypatch.setattr(check, "attend_checked", attend)
    assert run_case(case).message.startswith("the result is off by 1.00e-03")


def test_other_strides_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    simplest = draw_case(replayed([]))
    by_token = simplest.source.replace("randn(1, 2, S, 16)", "randn(1, S, 2, 16).transpose(1, 2)")
    case = dataclasses.replace(simplest, source=by_token)
    assert_right(run_case(case), case.source)
    monkeypatch.setattr(rewrite_attention, "_restore_layout", lambda insert, output, site: output)
    assert run_case(case).message.startswith("strides")


def test_a_tape_gives_the_same_case_and_shrinks() -> None:
    case = draw_case(seeded(3, 5))
    assert draw_case(replayed(case.tape)).source == case.source
    assert shrink([5, 9, 0, 7], lambda tape: tape[1] > 3, most_tries=100) == [0, 4, 0, 0]
