"""``calibrate`` on a small model: within the bound, resumed without a run, and the same when its policy is compiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from flexprefill_compile.block_masks.layout import BlockTables, compute_density, create_causal_grid, pack_causal_blocks
from flexprefill_compile.errors import UsageError
from flexprefill_compile.quality.calibration.calibrate import Calibration, calibrate
from flexprefill_compile.quality.calibration.text_measurer import TextMeasurer
from flexprefill_compile.quality.model_prefill import Prompt, prefill_dense, prefill_sparse
from flexprefill_compile.quality.predictions import sum_loss
from flexprefill_compile.quality.swapped_attention import attend_selected, swapped_attention
from flexprefill_compile.settings.config import InvalidOptionError, SparsePrefillConfig
from flexprefill_compile.settings.policy import LayerPolicy, ModelShape

BOUND = 0.01
CONFIG = SparsePrefillConfig(block_size=32, estimator="flexprefill")
RUNGS = ((0.4, 0), (0.7, 32), (0.95, 64))
USE_CACHE = {"use_cache": True}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """A Llama whose attention is sharp enough to lose something."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=3, initializer_range=0.2, eos_token_id=None, **sizes)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def text(model: LlamaForCausalLM) -> Tensor:
    """A text of the model's own, which dense attention predicts best."""
    torch.manual_seed(0)
    return model.generate(torch.tensor([[1]]), do_sample=True, max_new_tokens=332, pad_token_id=0)


@pytest.fixture(scope="module")
def runs_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "policy.json.runs.jsonl"


@pytest.fixture(scope="module")
def found(model: LlamaForCausalLM, text: Tensor, runs_path: Path) -> Calibration:
    return run(model, text, runs_path=runs_path)


def run(model: nn.Module, text: Tensor, **options: Any) -> Calibration:
    return calibrate(model, [text], max_loss_increase=BOUND, config=CONFIG, rungs=RUNGS, **options)


def test_the_policy_keeps_the_bound_below_the_cost_of_dense(found: Calibration) -> None:
    assert found.perplexity_ratio <= 1 + BOUND
    assert 0 < found.density < 1
    assert found.density == pytest.approx(sum(found.densities.values()) / 3)
    settings = [found.policy.of_layer(layer) for layer in range(3)]
    assert found.policy.model == ModelShape(architecture="LlamaForCausalLM", num_layers=3, num_heads=4)
    assert all(each.dense or (each.gamma, each.min_budget) in RUNGS for each in settings)
    assert len(set(settings)) > 1, "the layers of this model differ in what they bear"


def test_the_compiled_policy_gives_the_same_figures(
    model: LlamaForCausalLM, text: Tensor, found: Calibration, tmp_path: Path
) -> None:
    file = tmp_path / "policy.json"
    found.policy.save(file)
    options = {"policy": str(file), "block_size": 32, "min_length": 64}
    sparse = prefill_sparse(model, Prompt((text,), USE_CACHE), options)
    dense = prefill_dense(model, Prompt((text,), USE_CACHE))
    increase = (sum_loss(sparse.logits[0], text[0]) - sum_loss(dense[0], text[0])) / (text.shape[1] - 1)
    assert increase == pytest.approx(torch.tensor(found.perplexity_ratio).log().item(), abs=1e-4)
    densities = iter(sparse.densities)
    for layer, density in found.densities.items():
        compiled = 1.0 if found.policy.of_layer(layer).dense else next(densities).mean().item()
        assert compiled == pytest.approx(density, abs=1e-6)


def test_it_resumes_without_measuring_again(
    model: LlamaForCausalLM, text: Tensor, found: Calibration, runs_path: Path
) -> None:
    lines = runs_path.read_text().splitlines(keepends=True)
    assert len(lines) == found.num_runs
    runs_path.write_text("".join(lines[:-1]) + lines[-1][:20])  # stopped in the middle of a line
    kept: list[bool] = []
    again = run(model, text, runs_path=runs_path, on_run=lambda _, is_kept, *__: kept.append(is_kept))
    assert again == found
    assert kept == [True] * (found.num_runs - 1) + [False]
    assert json.loads(runs_path.read_text().splitlines()[-1]) == json.loads(lines[-1])


def test_runs_of_another_text_or_model_are_not_taken(
    model: LlamaForCausalLM, text: Tensor, found: Calibration, runs_path: Path
) -> None:
    kept: list[bool] = []
    options: dict[str, Any] = {"on_run": lambda _, is_kept, *__: kept.append(is_kept), "max_runs": 3}
    run(model, text.flip(-1), runs_path=runs_path, **options)
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    run(model, text, runs_path=runs_path, **options)
    with torch.no_grad():
        model.lm_head.weight[0] -= 1
    assert kept
    assert not any(kept)


def test_layers_can_share_their_settings(model: LlamaForCausalLM, text: Tensor) -> None:
    found = run(model, text, layers_at_once=2)
    assert found.policy.of_layer(0) == found.policy.of_layer(1)
    assert found.perplexity_ratio <= 1 + BOUND


def test_gamma_of_one_loses_nothing(model: LlamaForCausalLM, text: Tensor) -> None:
    measurer = TextMeasurer(model, [text, text[:, :100]])
    increase, densities = measurer.measure(
        dict.fromkeys(range(3), SparsePrefillConfig(gamma=1.0, block_size=32, min_budget=0))
    )
    assert abs(increase) < 1e-5
    assert densities == {0: 1.0, 1: 1.0, 2: 1.0}


def test_a_layer_without_settings_stays_dense_and_attention_is_put_back(model: LlamaForCausalLM, text: Tensor) -> None:
    measurer = TextMeasurer(model, [text])
    before = prefill_dense(model, Prompt((text,), USE_CACHE))
    _, densities = measurer.measure({1: SparsePrefillConfig(gamma=0.3, block_size=32, min_budget=0)})
    assert densities[0] == densities[2] == 1.0
    assert densities[1] < 1
    assert torch.equal(prefill_dense(model, Prompt((text,), USE_CACHE)), before)


def test_attention_is_swapped_by_layer(model: LlamaForCausalLM, text: Tensor) -> None:
    layers = []
    with swapped_attention(model, lambda layer, *_: layers.append(layer)) as heads:
        prefill_dense(model, Prompt((text,), USE_CACHE))
        prefill_dense(model, Prompt((text,), {"attention_mask": torch.ones_like(text).tril(-1)}))
    assert layers == [0, 1, 2]  # masked attention stays as it is
    assert heads == {0: 4, 1: 4, 2: 4}


def test_layers_with_a_window_are_written_as_dense(text: Tensor) -> None:
    # The shapes and the scale of the Llama's attention, which is compiled already.
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 16, "query_pre_attn_scalar": 16}
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
    config = Gemma3TextConfig(vocab_size=64, num_hidden_layers=2, **sizes, **kinds)
    found = run(Gemma3ForCausalLM(config).eval(), text, max_runs=4)
    assert found.policy.model.num_layers == 2
    assert found.policy.of_layer(0) == LayerPolicy(dense=True)
    assert list(found.densities) == [1]


def test_a_dict_as_config_is_refused(model: LlamaForCausalLM, text: Tensor) -> None:
    with pytest.raises(InvalidOptionError, match="config must be a SparsePrefillConfig"):
        calibrate(model, [text], config={"estimator": "auto"})  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [64, 77])
def test_selected_blocks_are_attended_exactly(length: int) -> None:
    query, key, value = torch.randn(1, 4, length, 16), torch.randn(1, 2, length, 16), torch.randn(1, 2, length, 16)
    num_blocks = -(-length // 16)
    grid = create_causal_grid(num_blocks, query.device) & (torch.rand(1, 4, num_blocks, num_blocks) < 0.4)
    grid |= torch.eye(num_blocks, dtype=torch.bool)
    tables: BlockTables = pack_causal_blocks(grid)
    mask = grid.repeat_interleave(16, -1).repeat_interleave(16, -2)[..., :length, :length].tril()
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(attend_selected(query, key, value, tables, 0.3, 16), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        compute_density(tables), grid.sum((-2, -1)) / (num_blocks * (num_blocks + 1) / 2), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("bound", [0.0, 1.0, -0.1, float("nan")])
def test_a_bound_out_of_range_is_refused(model: LlamaForCausalLM, text: Tensor, bound: float) -> None:
    with pytest.raises(UsageError, match=r"bound must be in \(0, 1\), got"):
        calibrate(model, [text], max_loss_increase=bound)


def test_what_can_not_be_calibrated_is_refused(model: LlamaForCausalLM, text: Tensor) -> None:
    with pytest.raises(UsageError, match=r"text 2 must be of more than 192 tokens, .* min_budget 128 .*, got 192"):
        calibrate(model, [text, text[:, :192]], config=CONFIG)
    with pytest.raises(UsageError, match=r"text 1 must be of more than 96 tokens, .* min_budget 32 .*, got 96"):
        calibrate(model, [text[:, :96]], config=CONFIG, rungs=((0.8, 64), (0.9, 32)))
    with pytest.raises(UsageError, match="calibrate must be given a text"):
        calibrate(model, [], config=CONFIG)
    model.set_attn_implementation("eager")
    with pytest.raises(UsageError, match="no attention of LlamaForCausalLM is a plain causal prefill"):
        run(model, text)
    model.set_attn_implementation("sdpa")
