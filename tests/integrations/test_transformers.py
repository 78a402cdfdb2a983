"""``attn_implementation="flexprefill"`` gives what SDPA or the model's own attention gives, sparse where it may."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.checked_attention import without_code_generation
from helpers.models import OPTIONS, relative_error
from helpers.zoo.checks import TOLERANCE
from helpers.zoo.models import FAMILIES, VOCABULARY, build_model
from torch import Tensor
from transformers import AutoModelForCausalLM, StaticCache

from flexprefill_compile import AttentionSkippedError, InvalidOptionError, SkipReason, register_transformers
from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.block_masks import masked_prefill, prefill
from flexprefill_compile.integrations.transformers import read_report
from flexprefill_compile.integrations.transformers.attention import compiled_attention
from flexprefill_compile.integrations.transformers.deferred_mask import DeferredMask

FAMILY_NAMES = ("llama", "qwen2", "mistral", "gemma3_text", "gpt_oss", "gemma2", "mimo_v2_flash")
LENGTH, CHUNK = 150, 70
DENSE = {key: value for key, value in OPTIONS.items() if key != "check_masks"} | {"gamma": 1.0}
PADDING = (torch.arange(LENGTH) >= torch.tensor([[0], [49]])).long()

Call = Callable[[Any], Tensor]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_transformers()
    compiled_attention.clear()
    yield
    compiled_attention.clear()


def draw_tokens(length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(length))


def prefill_padded(model: Any, padding: Tensor) -> Tensor:
    logits: Tensor = model(draw_tokens(LENGTH), attention_mask=padding).logits
    return logits[padding.bool()]


def prefill_packed(model: Any) -> Tensor:
    positions = torch.cat([torch.arange(80), torch.arange(LENGTH - 80)]).expand(2, -1)
    logits: Tensor = model(draw_tokens(LENGTH), position_ids=positions, use_cache=False).logits
    return logits


def prefill_in_chunks(model: Any) -> Tensor:
    cache = model(draw_tokens(LENGTH), use_cache=True).past_key_values
    second = model(draw_tokens(CHUNK), past_key_values=cache).logits
    step = model(draw_tokens(1), past_key_values=cache).logits
    return torch.cat([second, step], dim=1)


def prefill_static_chunks(model: Any) -> Tensor:
    cache = StaticCache(config=model.config, max_cache_len=256)
    logits: list[Tensor] = [model(draw_tokens(n), past_key_values=cache).logits for n in (LENGTH, CHUNK, 1)]
    return torch.cat(logits, dim=1)


def generate(model: Any, **kwargs: Any) -> Tensor:
    tokens: Tensor = model.generate(
        draw_tokens(LENGTH), attention_mask=PADDING, max_new_tokens=4, do_sample=False, **kwargs
    )
    return tokens.float()


CALLS: dict[str, Call] = {
    "plain": lambda model: model(draw_tokens(LENGTH)).logits,
    "padded left": lambda model: prefill_padded(model, PADDING),
    "padded right": lambda model: prefill_padded(model, PADDING.flip(-1)),
    "packed": prefill_packed,
    "chunks": prefill_in_chunks,
    "chunks, static cache": prefill_static_chunks,
    "generate": generate,
    "generate, static cache": lambda model: generate(model, cache_implementation="static"),
}
PREFILLS_OF_NO_CHUNK = ("plain", "padded left", "padded right", "packed")


def build(name: str, options: dict[str, Any]) -> Any:
    model = build_model(FAMILIES[name])
    model.config.flexprefill = options
    return model


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_gamma_1_is_what_the_model_gives_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name, DENSE)
    with torch.no_grad():
        expected = {call: run(model) for call, run in CALLS.items()}
        model.set_attn_implementation("flexprefill")
        for call, run in CALLS.items():
            with without_code_generation(), monkeypatch.context() as patched:
                if call in PREFILLS_OF_NO_CHUNK:
                    patched.setattr(DeferredMask, "materialise", refuse_to_materialise)
                assert relative_error(run(model), expected[call].double()) < TOLERANCE, call
            report = read_report(model)
            assert report.num_rewritten == len(report.sites) == model.config.num_hidden_layers, f"{call}\n{report}"


def refuse_to_materialise(mask: DeferredMask) -> Tensor:
    raise AssertionError("a mask of S x S elements was made")


@pytest.mark.parametrize("call", PREFILLS_OF_NO_CHUNK)
@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_the_blocks_are_those_of_the_compiled_model(name: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[tuple[Tensor, ...]] = []
    for module in (prefill, masked_prefill):
        monkeypatch.setattr(module, "record", lambda selected, *_: tables.append(tuple(selected)))
    options = DENSE | {"gamma": 0.8}
    model = build(name, options)
    with without_code_generation(is_dense=False), torch.no_grad():
        compiled = torch.compile(model, backend=FlexPrefillBackend(), options=options)
        expected = CALLS[call](compiled)
        of_compiled = [tables.pop(0) for _ in range(len(tables))]
        model.set_attn_implementation("flexprefill")
        actual = CALLS[call](model)
    assert len(of_compiled) == len(tables) == model.config.num_hidden_layers
    for own, other in zip(tables, of_compiled, strict=True):
        assert all(map(torch.equal, own, other))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    if call == "plain":
        causal = tables[0][0].numel() * (tables[0][0].shape[-1] + 1) // 2
        assert any((table[0] + table[2]).sum() < causal for table in tables), "nothing was left out"


def test_a_model_is_loaded_with_it(model_folder: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="flexprefill")
    model.config.flexprefill = DENSE
    with torch.no_grad(), without_code_generation():
        model(draw_tokens(LENGTH))
    assert read_report(model).num_rewritten == 2


def test_inductor_compiles_it() -> None:
    model = build("llama", DENSE)
    with torch.no_grad():
        expected = model(draw_tokens(LENGTH)).logits
        model.set_attn_implementation("flexprefill")
        assert relative_error(model(draw_tokens(LENGTH)).logits, expected.double()) < TOLERANCE
    assert read_report(model).num_rewritten == 2


def test_it_may_be_compiled_as_well() -> None:
    model = build("gpt_oss", DENSE)
    with torch.no_grad(), without_code_generation():
        expected = prefill_padded(model, PADDING)
        model.set_attn_implementation("flexprefill")
        backend = FlexPrefillBackend()
        compiled = torch.compile(model, backend=backend, options=DENSE)
        assert relative_error(prefill_padded(compiled, PADDING), expected.double()) < TOLERANCE
    assert backend.report.num_rewritten == 2


# Settings


def run_with(options: Any, name: str = "llama", **kwargs: Any) -> Any:
    model = build(name, options)
    model.set_attn_implementation("flexprefill")
    with torch.no_grad(), without_code_generation(is_dense=False):
        model(draw_tokens(LENGTH), **kwargs)
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 2}, "gamma must be"),
        ({"gama": 0.9}, "did you mean 'gamma'"),
        (DENSE | {"gamma": [0.9, 0.8]}, "one for each of 4 query heads"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        run_with(options)


def test_layers_are_numbered() -> None:
    report = read_report(run_with(DENSE | {"dense_layers": [1]}))
    assert [site.reason for site in report.sites] == [None, SkipReason.DENSE_LAYER]


def test_settings_may_change_between_calls() -> None:
    model = run_with(DENSE)
    model.config.flexprefill = DENSE | {"min_length": 1000}
    with torch.no_grad():
        model(draw_tokens(LENGTH))
    assert [site.reason for site in read_report(model).sites] == [SkipReason.TOO_SHORT] * 2


# What stays dense


def test_a_short_prompt_is_exactly_sdpa() -> None:
    model = build("mistral", {})
    with torch.no_grad():
        expected = [run(model) for run in CALLS.values()]
        model.set_attn_implementation("flexprefill")
        for run, logits in zip(CALLS.values(), expected, strict=True):
            assert torch.equal(run(model), logits)
    assert {site.reason for site in read_report(model).sites} == {SkipReason.TOO_SHORT}


def test_training_is_exactly_sdpa() -> None:
    model = build("llama", DENSE)
    gradients = []
    for implementation in ("sdpa", "flexprefill"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(draw_tokens(LENGTH), labels=draw_tokens(LENGTH)).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *gradients))
    assert {site.reason for site in read_report(model).sites} == {SkipReason.GRADIENT}


def see_first_tokens(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key < 10


def test_what_is_not_causal_stays_dense_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() | (torch.arange(LENGTH) < 10)
    given = {"attention_mask": mask.expand(2, 1, -1, -1)}
    model = run_with(DENSE | {"max_mask_elements": 10}, **given)
    reasons = [(site.reason, site.detail) for site in read_report(model).sites]
    assert reasons == [(SkipReason.MASK_NOT_LIFTED, "a mask of 45000 elements, more than 10")] * 2
    with pytest.raises(AttentionSkippedError, match="layer 0 stays dense"):
        run_with(DENSE | {"max_mask_elements": 10, "on_skip": "raise"}, **given)
    assert "45000" not in caplog.text  # it is in the report; the log names what a compile found


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_given_mask_is_read(dtype: torch.dtype) -> None:
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().triu(-40).expand(2, 1, -1, -1)
    mask = visible if dtype == torch.bool else torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    model = build("llama", DENSE)
    with torch.no_grad(), without_code_generation():
        expected = model(draw_tokens(LENGTH), attention_mask=mask).logits
        model.set_attn_implementation("flexprefill")
        actual = model(draw_tokens(LENGTH), attention_mask=mask).logits
    assert relative_error(actual, expected.double()) < TOLERANCE
    assert read_report(model).num_rewritten == 2


def test_continuous_batching_refuses_it() -> None:
    model = build("llama", DENSE)
    model.set_attn_implementation("flexprefill")
    with pytest.raises(ValueError, match="flexprefill is not supported for continuous batching"):
        model.generate_batch([[3, 4, 5]], max_new_tokens=1)
