"""The serving benchmark without vLLM: a load is served in order and summed up, and what is wrong is found."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


class Engine:
    """Gives each request a token a step: the length of its prompt, then one more each time."""

    def __init__(self) -> None:
        self.running: dict[str, tuple[list[int], list[int], int]] = {}
        self.added: list[int] = []

    def add_request(self, name: str, prompt: dict[str, list[int]], sampling: Any) -> None:
        self.added.append(len(prompt["prompt_token_ids"]))
        self.running[name] = (prompt["prompt_token_ids"], [], sampling.max_tokens)

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)

    def step(self) -> list[Any]:
        outputs = []
        for name, (prompt, tokens, most) in list(self.running.items()):
            tokens.append(len(prompt) + len(tokens))
            logits = [{token: SimpleNamespace(logprob=float(token))} for token in tokens]
            own = SimpleNamespace(token_ids=tuple(tokens), logprobs=logits)
            outputs.append(SimpleNamespace(request_id=name, outputs=[own]))
            if len(tokens) == most:
                del self.running[name]
        return outputs


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    fake = ModuleType("vllm")
    fake.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", fake)
    import vllm_serving  # noqa: PLC0415

    return vllm_serving


def test_requests_are_served_when_they_are_due(serving: Any) -> None:
    engine = Engine()
    streams = serving.serve(engine, [(0.0, [1] * 10), (0.05, [1] * 20)], 3)
    assert engine.added == [10, 20]
    assert [stream.tokens for stream in streams] == [[10, 11, 12], [20, 21, 22]]
    assert all(stream.times_s == sorted(stream.times_s) and len(stream.times_s) == 3 for stream in streams)
    figures = serving.summarise(streams, [10, 20])
    assert figures["tokens"] == 36
    assert 0 <= figures["first token p50_s"] <= figures["first token p99_s"] < 0.05


def test_logits_come_where_they_are_asked_for(serving: Any) -> None:
    assert serving.serve(Engine(), [(0.0, [1] * 10)], 2)[0].logits == []
    assert serving.serve(Engine(), [(0.0, [1] * 10)], 2, 5)[0].logits == [{10: 10.0}, {11: 11.0}]


def test_tokens_that_change_are_an_error(serving: Any) -> None:
    engine = Engine()
    step = engine.step

    def forget() -> list[Any]:
        outputs = step()
        outputs[0].outputs[0].token_ids = (0, *outputs[0].outputs[0].token_ids[1:])
        return outputs if len(engine.running) == 0 else step()

    engine.step = forget  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="the tokens of request 0 changed"):
        serving.serve(engine, [(0.0, [1] * 10)], 5)


def test_prompts_differ_from_their_first_token_on(serving: Any) -> None:
    prompts = serving.cut_prompts(list(range(5000)))
    first = [next(prompts)[:2] for _ in range(3)]
    assert first == [[0, 1], [997, 998], [1994, 1995]]


def test_percentiles(serving: Any) -> None:
    values = [float(i) for i in range(100)]
    assert [serving.find_percentile(values, p) for p in (50, 99)] == [50, 99]
    assert serving.find_percentile([3.0], 99) == 3


def make_results(tokens: list[int], lost: int) -> dict[str, Any]:
    load = {"first token p50_s": 0.1, "first token p99_s": 0.2, "between tokens p50_s": 0.01}
    load |= {"between tokens p99_s": 0.02, "tokens": 100.0, "duration_s": 2.0}
    results = {"first_token_s": {"8192": [0.3, 0.1, 0.2]}, "tokens": [tokens], "load": load, "lost": lost}
    return results | {"logits": [[[[token, 20.0]] for token in tokens]], "epsilon": 2**-7}


SPACING = 0.125  # of bf16 from 16 to 32


@pytest.mark.parametrize(("more", "gap"), [(0, 2), (1, 3), (2, 4), (3, 5)])
def test_a_gap_is_what_both_engines_prefer(serving: Any, more: int, gap: int) -> None:
    dense = [[[1, 20.0]], [[2, 20.0], [3, 20.0 - SPACING]], [[5, 9.0]]]
    other = [[[1, 20.0 + SPACING]], [[2, 20.0], [3, 20.0 + SPACING * (1 + more)]], [[6, 70.0]]]
    found = serving.compare([1, 2, 5], [1, 3, 6], dense, other, epsilon=2**-7)
    assert found == serving.Comparison(same=1, gap=gap, drift=max(1, 2 + more))
    results = {"dense": {"tokens": [[1, 2, 5]], "logits": [dense], "epsilon": 2**-7, "lost": 0}}
    results["gamma 1"] = {"tokens": [[1, 3, 6]], "logits": [other], "lost": 0}
    assert bool(serving.find_faults(results)) == (gap > serving.TIE_SPACINGS)
    assert serving.describe_comparisons([found])[1] == f"prompt 0 parts at token 1: a gap of {gap}.0 spacings"


def test_a_token_that_is_not_among_the_largest_is_no_tie(serving: Any) -> None:
    found = serving.compare([2], [3], [[[2, 20.0]]], [[[3, 20.0], [2, 19.9]]], epsilon=2**-7)
    assert found.gap == float("inf")


def test_the_tables_and_what_is_wrong(serving: Any) -> None:
    right = {name: make_results([1, 2], 0) for name in serving.ENGINES}
    assert serving.find_faults(right) == []
    shown = serving.format_results(right)
    assert "dense    200 ms" in shown
    assert "sparse   50                     100 ms" in shown
    wrong = right | {"gamma 1": make_results([1, 3], 0), "sparse": make_results([1, 2], 2)}
    assert [fault.split(" ")[0] for fault in serving.find_faults(wrong)] == ["at", "sparse:"]
