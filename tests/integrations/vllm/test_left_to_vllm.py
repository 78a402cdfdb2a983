"""What the plugin leaves to vLLM, with the reason, and what its profiling run takes."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.serving.sparse_engine import DENSE, build, run

from flexprefill_compile import AttentionSkippedError
from flexprefill_compile.integrations.vllm import plan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": (49, 0)}, "a window of 50 < 96"),
        ({"alibi_slopes": torch.ones(4)}, "ALiBi"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "a KV cache of fp8_e4m3"),
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"dcp_world_size": 2}, "context parallelism"),
    ],
)
def test_layers_that_are_left_to_vllm(changes: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = build(DENSE, **changes)
    for _ in range(2):
        engine.step([(engine.add(200), 200), (engine.add(20), 20)])
    assert engine.impl.seen == [220, 220]
    assert [record.message for record in caplog.records if message in record.message][1:] == []
    assert message in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_prefilling": None}, "set VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"seq_lens_cpu_upper_bound": None}, "set VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"causal": False}, "not causal"),
        ({"causal": torch.ones(1, dtype=torch.int32)}, "not causal"),
        ({"rswa_prefix_lens": torch.tensor([3])}, "rswa_prefix_lens"),
    ],
)
def test_steps_that_are_left_to_vllm(changes: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = build(DENSE)
    engine.step([(engine.add(200), 200)], **changes)
    assert engine.impl.seen == [200]
    assert message in caplog.text


def test_speculative_decoding_is_left_to_vllm(caplog: pytest.LogCaptureFixture) -> None:
    engine = build(DENSE)
    engine.builder.has_speculation = True
    run(engine, [(engine.add(200), 200)])
    assert engine.impl.seen == [200]
    assert "speculative decoding" in caplog.text


def test_cascade_attention_is_left_to_vllm(caplog: pytest.LogCaptureFixture) -> None:
    engine = build(DENSE)
    metadata = engine.describe([(engine.add(200), 200)])
    assert plan.find_refusal(metadata, 64) == "cascade attention"
    assert plan.find_refusal(metadata, 0) is None


def test_rows_that_are_no_prefill_are_left_to_vllm() -> None:
    engine = build(DENSE)
    request = engine.add(10, generated=190)
    run(engine, [(request, 10)])
    run(engine, [(request, 190)])  # as many tokens of what was generated
    assert engine.impl.seen == [10, 190]


def test_what_the_backend_refuses_is_left_to_vllm(caplog: pytest.LogCaptureFixture) -> None:
    engine = build(DENSE, head_size=8)
    run(engine, [(engine.add(200), 200), (engine.add(20), 20)])
    run(engine, [(engine.add(200), 200)])
    assert engine.impl.seen == [220, 200]
    assert "head dimension below" in caplog.text


def test_a_layer_set_to_stay_dense() -> None:
    engine = build(DENSE | {"dense_layers": [3]})
    run(engine, [(engine.add(200), 200), (engine.add(20), 20)])
    assert engine.impl.seen == [220]


def test_what_must_stay_dense_may_be_an_error() -> None:
    engine = build(DENSE | {"on_skip": "raise"}, alibi_slopes=torch.ones(4))
    with pytest.raises(AttentionSkippedError, match="ALiBi"):
        engine.step([(engine.add(20), 20)])
    engine = build(DENSE | {"on_skip": "raise"}, head_size=8)
    with pytest.raises(AttentionSkippedError, match="head dimension"):
        engine.step([(engine.add(200), 200)])


def test_the_profiling_run_takes_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr("flexprefill_compile.integrations.vllm.mixins.reserve", lambda size, _: taken.append(size))
    engine, query = build(DENSE), torch.zeros(3, 4, 16)
    layer = SimpleNamespace(layer_name="model.layers.0.self_attn.attn")
    for _ in range(2):
        engine.impl.forward(layer, query, query, query, engine.kv_cache, None, query)
    assert taken == [2 * 512 * 2 * 16 * 4 + 40 * 4 * 8 * 16]


def test_log_level_is_one_that_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    plan.log_once("a reason")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
