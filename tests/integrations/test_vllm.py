"""The vLLM plugin without vLLM: steps over a paged cache give dense attention, sparse where they may."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.checked_attention import without_code_generation
from helpers.models import relative_error
from helpers.paged_engine import LAYOUTS, DenseBuilder, DenseImpl, Engine, Request
from torch import Tensor

from flexprefill_compile import AttentionSkippedError, InvalidOptionError
from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.block_masks import masked_prefill, prefill
from flexprefill_compile.integrations import vllm as plugin
from flexprefill_compile.integrations.vllm import plan
from flexprefill_compile.integrations.vllm.mixins import AttendsSparsely, PlansPrefills
from flexprefill_compile.integrations.vllm.prompt_attention import compiled_attention
from flexprefill_compile.integrations.vllm.settings import make_settings, read_options
from flexprefill_compile.integrations.vllm.versions import check_version
from flexprefill_compile.settings.rank_groups import RankGroup

OPTIONS: dict[str, Any] = {"block_size": 32, "min_budget": 0, "min_length": 96}
DENSE = OPTIONS | {"gamma": 1.0}
CPU = torch.device("cpu")


class Builder(PlansPrefills, DenseBuilder):
    """As the plugin's, before the stand-in of vLLM's."""


class Impl(AttendsSparsely, DenseImpl):
    """As the plugin's, before the stand-in of vLLM's."""

    max_tokens = (512, 256)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    plan.log_once.cache_clear()
    compiled_attention.clear()
    yield
    compiled_attention.clear()


def build(options: dict[str, Any], layout: str = "heads first", **changes: Any) -> Engine:
    impl, builder = Impl(layout, **changes), Builder()
    impl.settings = builder.settings = make_settings(options, CPU, None)
    return Engine(layout, impl, builder)


def check(engine: Engine, request: Request, output: Tensor) -> None:
    expected = engine.expect(request, request.done - len(output), request.done)
    assert relative_error(output, expected.double()) < 1e-5


def run(engine: Engine, scheduled: list[tuple[Request, int]], **kwargs: Any) -> list[Tensor]:
    outputs = engine.step(scheduled, **kwargs)
    for (request, _), output in zip(scheduled, outputs, strict=True):
        check(engine, request, output)
    return outputs


# At gamma 1 it is dense attention


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixed_steps_are_dense_attention(layout: str) -> None:
    engine = build(DENSE, layout)
    old, long, short, cached = engine.add(40), engine.add(200), engine.add(50), engine.add(170)
    with without_code_generation():
        run(engine, [(old, 40), (cached, 64)])  # below min_length: all vLLM's
        run(engine, [(old, 1), (long, 131), (short, 50), (cached, 106)], padding=2)
        run(engine, [(short, 1), (long, 69), (old, 1)])
        run(engine, [(long, 1), (cached, 1)])
    assert engine.impl.seen == [104, 51, 2, 2]  # each sparse token was left out there
    assert engine.builder.fast_builds == 2


def test_a_step_of_one_prompt_needs_nothing_of_vllm() -> None:
    engine = build(DENSE)
    with without_code_generation():
        run(engine, [(engine.add(200), 200)])
    assert engine.impl.seen == []


def test_chunks_are_the_whole_prompt() -> None:
    engine = build(DENSE)
    request = engine.add(300)
    with without_code_generation():
        parts = [run(engine, [(request, count)])[0] for count in (97, 33, 100, 70)]
    whole = engine.expect(request, 0, 300)
    assert relative_error(torch.cat(parts), whole.double()) < 1e-5
    assert engine.impl.seen == []


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": (99, 0)},
        {"sliding_window": (249, 0)},
        {"logits_soft_cap": 2.0},
        {"sinks": torch.tensor([1.0, -2.0, 0.0, 3.0])},
        {"sinks": torch.tensor([1.0, -2.0, 0.0, 3.0]), "sliding_window": (99, 0)},
        {"num_kv_heads": 4},
        {"num_kv_heads": 1},
    ],
)
def test_forms_of_attention(changes: dict[str, Any]) -> None:
    engine = build(DENSE, **changes)
    request, other = engine.add(300), engine.add(110)
    with without_code_generation():
        run(engine, [(request, 130)])
        run(engine, [(request, 170), (other, 110)])
    assert engine.impl.seen == [], "it was left to vLLM"


def test_pages_before_a_window_are_not_read() -> None:
    engine = build(DENSE, sliding_window=(99, 0))
    request = engine.add(300)
    with without_code_generation():
        run(engine, [(request, 200)])
        before = request.pages[: (200 - 99) // 16].long()
        request.pages[: len(before)] = 63  # vLLM frees them; nothing was ever written there
        engine.step([(request, 100)])
    assert engine.impl.seen == []


def test_a_layer_without_keys_of_its_own() -> None:
    engine = build(DENSE, kv_sharing_target_layer_name="model.layers.2.self_attn.attn")
    request, old = engine.add(200), engine.add(20)
    with without_code_generation():
        run(engine, [(request, 200), (old, 20)], has_keys=False)
    assert engine.impl.seen == [20]


# Below it, the blocks are those of the compiled model


def record_tables(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, ...]]:
    tables: list[tuple[Tensor, ...]] = []
    for module in (prefill, masked_prefill):
        monkeypatch.setattr(module, "record", lambda selected, *_: tables.append(tuple(selected)))
    return tables


@pytest.mark.parametrize("first", [384, 200])
def test_the_blocks_are_those_of_the_compiled_call(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = OPTIONS | {"gamma": 0.6}
    tables = record_tables(monkeypatch)
    engine = build(options)
    request = engine.add(384)
    with without_code_generation(is_dense=False), torch.no_grad():
        outputs = [engine.step([(request, n)])[0] for n in (first, 384 - first) if n]
        of_steps = list(tables)
        tables.clear()

        def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=0.3, enable_gqa=True
            )

        expected = []
        for begin, end in [(0, first), (first, 384)][: len(outputs)]:
            mask = None if begin == 0 else torch.ones(end, end, dtype=torch.bool).tril()[begin:]
            stretch = slice(begin, end)
            tensors = (request.query[stretch], request.key[:end], request.value[:end])
            batch = [x.transpose(0, 1).unsqueeze(0).contiguous() for x in tensors]
            compiled = torch.compile(attend, backend=FlexPrefillBackend(), options=options)
            expected.append(compiled(*batch, mask)[0].transpose(0, 1))
    assert len(of_steps) == len(tables) == len(outputs)
    for own, other in zip(of_steps, tables, strict=True):
        assert all(map(torch.equal, own, other))
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)
    blocks = -(-first // 32)
    assert (of_steps[0][0] + of_steps[0][2]).sum() < 4 * blocks * (blocks + 1) // 2, "nothing was left out"


def test_all_lengths_share_one_compilation() -> None:
    engine = build(DENSE)
    for length in (130, 200, 131, 333):
        run(engine, [(engine.add(length, 0), length)])
    assert engine.impl.seen == []
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# What is left to vLLM


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


# Settings


def test_options_come_from_additional_config_or_the_environment() -> None:
    environment = {"FLEXPREFILL_OPTIONS": '{"gamma": 0.7}'}
    assert read_options({}, {}) == {}
    assert read_options({"other": 1}, environment) == {"gamma": 0.7}
    assert read_options({"flexprefill": {"gamma": 0.9}}, environment) == {"gamma": 0.9}
    assert read_options({"flexprefill": '{"gamma": 0.9}'}, {}) == {"gamma": 0.9}


@pytest.mark.parametrize("given", ["gamma=0.9", "[1]", "3"])
def test_options_that_do_not_parse_are_refused_in_one_sentence(given: str) -> None:
    with pytest.raises(InvalidOptionError, match="FLEXPREFILL_OPTIONS must be a JSON object"):
        read_options({}, {"FLEXPREFILL_OPTIONS": given})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 2}, "gamma must be"),
        ({"gama": 0.9}, "did you mean 'gamma'"),
        ({"sequence_parallel": 2}, "can't be given to vLLM"),
        ({"tensor_parallel": 2}, "can't be given to vLLM"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        make_settings(options, CPU, None)


def test_settings_by_head_are_this_rank_s() -> None:
    settings = make_settings({"gamma": [0.1, 0.2, 0.3, 0.4]}, CPU, RankGroup("tp", 2, 1))
    config = settings.of_layer("model.layers.0.self_attn.attn", 2)
    assert config is not None
    assert config.gamma == (0.3, 0.4)
    with pytest.raises(InvalidOptionError, match="one for each of 6 query heads"):
        settings.of_layer("model.layers.0.self_attn.attn", 3)


def test_min_length_is_the_device_s() -> None:
    assert make_settings({}, CPU, None).min_length == 4096


# The plugin


@pytest.mark.parametrize("version", ["0.20.0", "0.20.2", "0.33.0+cu130", "0.32.1.dev3"])
def test_versions(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.19.1", "0.34.0", "1.0", "dev"])
def test_other_versions_are_refused_in_one_sentence(version: str) -> None:
    with pytest.raises(ImportError, match=rf"needs vLLM 0.20 to 0.33, this is {version}"):
        check_version(version)


def test_the_entry_point_registers_and_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    plugin.register()  # no vLLM, or one without a registry
    registered: dict[Any, str] = {}
    name = "vllm.v1.attention.backends.registry"
    registry = ModuleType(name)
    vars(registry).update(
        AttentionBackendEnum=SimpleNamespace(CUSTOM="custom"), register_backend=registered.__setitem__
    )
    for parent in ("vllm", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.backends"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, registry)
    plugin.register()
    assert registered == {"custom": plugin.BACKEND}


def test_log_level_is_one_that_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    plan.log_once("a reason")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
