"""The vLLM plugin in vLLM's own engine, on a CPU: a CPU build of vLLM, with FlashAttention's kernels in plain torch.

Skipped without vLLM, and on machines where it looks for a GPU. It wants a torch of its own: see CONTRIBUTING.md.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.serving.vllm_on_cpu import flash_attention_on_cpu

from flexprefill_compile import AttentionSkippedError, InvalidOptionError
from flexprefill_compile.block_masks import record_densities
from flexprefill_compile.integrations.vllm import BACKEND
from flexprefill_compile.integrations.vllm.mixins import AttendsSparsely, PlansPrefills
from flexprefill_compile.integrations.vllm.plan import find_refusal

pytest.importorskip("vllm")

from vllm import LLM, SamplingParams
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM is not a CPU build")

DENSE_BACKEND = "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"
OPTIONS = {"block_size": 16, "min_budget": 0, "min_length": 128}
TEXT = bytes(range(33, 123)).decode() * 8
# The second round finds the first's pages: a prompt and a half of another.
ROUNDS = ((TEXT[:500], "ab", TEXT[7:600], TEXT[:610]), (TEXT[:500] + "no" * 60, TEXT[7:300]))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.delenv("FLEXPREFILL_OPTIONS", raising=False)


def generate(folder: Path, backend: str, **kwargs: Any) -> tuple[list[tuple[int, ...]], int]:
    """Return the tokens of all rounds, and how many prompt tokens were found in the prefix cache."""
    sizes = {"max_model_len": 1024, "max_num_batched_tokens": 200, "max_num_seqs": 8, "block_size": 32}
    tokens, cached = [], 0
    with flash_attention_on_cpu(backend):
        engine = LLM(str(folder), dtype="float32", enforce_eager=True, **sizes, **kwargs)
        for prompts in ROUNDS:
            sampling = SamplingParams(temperature=0, max_tokens=8)
            for output in engine.generate(list(prompts), sampling, use_tqdm=False):
                tokens.append(tuple(output.outputs[0].token_ids))
                cached += output.num_cached_tokens
    return tokens, cached


def test_tokens_are_those_of_vllm_at_gamma_1(model_folder: Path) -> None:
    expected, _ = generate(model_folder, DENSE_BACKEND)
    with record_densities() as densities:
        actual, cached = generate(model_folder, BACKEND, additional_config={"flexprefill": OPTIONS | {"gamma": 1.0}})
    assert actual == expected
    assert cached > 600
    assert len(densities) >= 2 * 2 * 4  # layers, chunks, long prompts
    assert torch.stack(densities).min() == 1


def test_options_may_come_from_the_environment(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "FLEXPREFILL_OPTIONS", '{"gamma": 0.3, "block_size": 16, "min_budget": 0, "min_length": 128, "tau": 0}'
    )
    with record_densities() as densities:
        generate(model_folder, BACKEND)
    assert 0 < torch.stack(densities).min() < 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gama": 0.9}, InvalidOptionError, "did you mean 'gamma'"),
        ({"gamma": [0.9, 0.8]}, InvalidOptionError, "one for each of 4 query heads"),
        ({"sequence_parallel": 2}, InvalidOptionError, "can't be given to vLLM"),
    ],
)
def test_bad_options_stop_the_engine_at_start_up(
    model_folder: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        generate(model_folder, BACKEND, additional_config={"flexprefill": options})


def test_what_must_stay_dense_stops_the_engine_if_asked(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = flash_attn.FlashAttentionImpl.__init__

    def build_with_alibi(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.alibi_slopes = torch.ones(4)

    monkeypatch.setattr(flash_attn.FlashAttentionImpl, "__init__", build_with_alibi)
    with pytest.raises(AttentionSkippedError, match="ALiBi"):
        generate(model_folder, BACKEND, additional_config={"flexprefill": {"on_skip": "raise"}})


# The interface


def test_vllm_finds_the_plugin() -> None:
    load_general_plugins()
    assert AttentionBackendEnum.CUSTOM.get_path() == BACKEND
    assert AttentionBackendEnum.CUSTOM.get_class().get_name() == "CUSTOM"


@pytest.mark.parametrize(
    ("own", "theirs"),
    [
        (AttendsSparsely.forward, flash_attn.FlashAttentionImpl.forward),
        (PlansPrefills.build, flash_attn.FlashAttentionMetadataBuilder.build),
    ],
)
def test_methods_take_what_vllm_s_take(own: Any, theirs: Any) -> None:
    assert list(inspect.signature(own).parameters) == list(inspect.signature(theirs).parameters)


def test_a_step_s_metadata_has_the_fields_that_are_read() -> None:
    starts, lengths = torch.tensor([0, 200]).int(), torch.tensor([200]).int()
    table, slots = torch.zeros(1, 8).int(), torch.arange(200)
    common = CommonAttentionMetadata(
        *(starts, starts, lengths, 1, 200, 200, 200, table, slots),
        is_prefilling=torch.tensor([True]),
        seq_lens_cpu_upper_bound=lengths,
    )
    assert find_refusal(common, 0) is None
    assert not flash_attn.FlashAttentionBackend.forward_includes_kv_cache_update
