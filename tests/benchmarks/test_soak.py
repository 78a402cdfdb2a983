"""The soak: a short one holds, and each of its laws can be broken."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.checked_attention import without_code_generation
from torch import Tensor

if TYPE_CHECKING:
    from soak import Soak
    from soak_laws import Record
    from soak_prompts import Prompt


@pytest.fixture(autouse=True)
def beside_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def make_records(**series: Callable[[int], Any]) -> list[Record]:
    """Return an hour of records in which all holds, but for the given figures by minute."""
    from soak_laws import Record  # noqa: PLC0415

    noise = random.Random(0)
    record = Record(0.0, 30, 30000, 20.0, 900.0, 0.0, 0.0, 5000, 60, 0, 0.8, 1e-6, 0.9)
    figures = {"minute": lambda minute: minute + 1.0, "resident_mib": lambda _: 900 + noise.uniform(-20, 20)} | series
    return [
        dataclasses.replace(record, **{name: figure(minute) for name, figure in figures.items()})
        for minute in range(60)
    ]


def judge(records: list[Record]) -> list[str]:
    from soak_laws import find_faults  # noqa: PLC0415

    return find_faults(records, tolerance=1e-5, most_graphs=72, most_recordings=100)


def test_noise_and_what_compilation_takes_are_no_fault() -> None:
    assert judge(make_records()) == []
    assert judge(make_records()[:1]) == []
    compiling = {
        "graphs": lambda minute: min(60, 4 * minute),
        "resident_mib": lambda minute: min(900, 600 + 20 * minute),
    }
    assert judge(make_records(**compiling, us_per_token=lambda minute: 20 + minute % 3)) == []


def test_a_rare_kind_of_prompt_may_compile_late_and_take_memory() -> None:
    noise = random.Random(0)
    late = make_records(
        graphs=lambda minute: 55 + (minute > 45) + 2 * (minute > 50),
        resident_mib=lambda minute: 900 + 40 * (minute > 45) + 80 * (minute > 50) + noise.uniform(-9, 9),
        tensors=lambda minute: 5000 + 300 * (minute > 45) + 600 * (minute > 50),
    )
    assert judge(late) == []


@pytest.mark.parametrize(
    ("name", "figure", "sentence"),
    [
        ("resident_mib", lambda minute: 900 + minute + minute % 7, "MiB of memory grew by 59 an hour"),
        ("allocated_mib", lambda minute: 20.0 * minute, "MiB of live tensors on the GPU grew by 1200 an hour"),
        ("reserved_mib", lambda minute: 20.0 * minute, "MiB reserved on the GPU grew by 1200 an hour"),
        ("tensors", lambda minute: 5000 + 2 * minute, "live tensors grew by 120 an hour"),
        ("graphs", lambda _: 73, "73 graphs were compiled, more than 72"),
        ("graphs", lambda minute: 20 + minute // 2, "14 of 49 graphs were compiled in the second half"),
        ("recordings", lambda _: 101, "101 CUDA graphs were recorded, more than 100"),
        ("recordings", lambda minute: minute, "29 of 59 CUDA graphs were recorded in the second half"),
        ("us_per_token", lambda minute: 20.0 + 50 * (minute > 44), "a token took 20 us, then 70 us at the end"),
        ("sparse_error", lambda _: 1e-6, "sparse attention is within 1.0e-05 of dense"),
        ("faults", lambda minute: ("gamma 1 is far from dense",) * (minute == 3), "gamma 1 is far from dense"),
    ],
)
def test_each_law_can_be_broken(name: str, figure: Callable[[int], Any], sentence: str) -> None:
    faults = judge(make_records(**{name: figure}))
    assert len(faults) == 1
    assert faults[0].startswith(sentence)


def test_the_second_half_begins_after_half_of_the_prompts() -> None:
    from soak_laws import take_second_half  # noqa: PLC0415

    later = take_second_half(make_records(prompts=lambda minute: 1 if minute < 40 else 100))
    assert [record.minute for record in later] == list(range(50, 61))


@pytest.fixture(scope="module")
def prompt() -> Prompt:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        from soak_prompts import Prompt, draw_prompts  # noqa: PLC0415
    drawn = next(draw_prompts(0, "cpu", [640]))
    return Prompt(drawn.tokens[:1], None, (320, 320))


@pytest.fixture(scope="module")
def shared_soak(prompt: Prompt) -> Soak:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        from soak import Soak  # noqa: PLC0415
    soak = Soak(0, "cpu", torch.float32, has_graphs=False)
    soak.prompts = itertools.repeat(prompt)
    return soak


@pytest.fixture
def soak(shared_soak: Soak) -> Iterator[Soak]:
    """Return a soak whose graphs run without code generation, and whose prompts are all alike."""
    with without_code_generation(is_dense=False):
        yield copy.copy(shared_soak)
    torch.compiler.reset()


def test_prompts_alone_and_in_threads_hold(soak: Soak) -> None:
    checked = [one for _ in range(4) for one in soak.run_turn()[1]]
    assert [one.faults for one in checked] == [()] * 6
    assert [len(one.densities) for one in checked] == [4, 4, 4, 0, 0, 0]
    assert max(one.error for one in checked) <= soak.tolerance < min(one.sparse_error for one in checked)
    record = soak.run_minute(started=0.0, seconds=0.0)
    assert record.prompts == 1
    assert 0 < record.density < 1
    assert record.graphs >= 4


def check_broken(soak: Soak, prompt: Prompt) -> str:
    return " ".join(soak.check(prompt, is_alone=True).faults)


def test_a_wrong_result_is_seen(soak: Soak, prompt: Prompt) -> None:
    soak.dense = soak.sparse
    assert "from dense: batch 1, chunks (320, 320), no mask" in check_broken(soak, prompt)


def test_what_ran_dense_is_seen(soak: Soak, prompt: Prompt) -> None:
    soak.dense = soak.sparse = soak.eager
    assert "4 attention calls ran dense" in check_broken(soak, prompt)


def test_what_changes_or_is_not_finite_is_seen(soak: Soak, prompt: Prompt) -> None:
    scales = itertools.count(1.0)

    def change(*inputs: Any, **named: Any) -> Any:
        output = soak.eager(*inputs, **named)
        output.logits = output.logits * next(scales)
        return output

    def spoil(*inputs: Any, **named: Any) -> Any:
        output = soak.eager(*inputs, **named)
        output.logits = torch.full_like(output.logits, torch.nan)
        return output

    soak.sparse = change
    assert "not the same twice" in check_broken(soak, prompt)
    soak.sparse = spoil
    assert "not finite" in check_broken(soak, prompt)


def test_an_error_is_a_fault(soak: Soak, prompt: Prompt) -> None:
    def fail(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no graph")

    soak.sparse = fail
    assert check_broken(soak, prompt) == "RuntimeError no graph: batch 1, chunks (320, 320), no mask"
