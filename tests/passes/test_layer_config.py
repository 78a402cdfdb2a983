"""Settings by layer and by head, from a file to the compiled graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import OPTIONS, TwoLayers
from torch import Tensor, nn

from flexprefill_compile import (
    InvalidOptionError,
    LayerPolicy,
    ModelShape,
    Policy,
    SkipReason,
    SparsePrefillConfig,
    register_estimator,
)
from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.block_masks import record_densities
from flexprefill_compile.block_masks.estimators.inputs import EstimatorInputs
from flexprefill_compile.block_masks.layout import create_causal_grid
from flexprefill_compile.block_masks.prefill import select_prefill_blocks
from flexprefill_compile.passes.layer_config import config_for_layer, number_layer
from flexprefill_compile.settings.registry import name_estimator

SHAPE = ModelShape(architecture="TwoLayers", num_layers=2, num_heads=4)
POLICY = Policy(
    SHAPE, {1: LayerPolicy(gamma=(0.5, 0.6, 0.7, 1.0), tau=0.2, min_budget=64, max_budget=256, estimator="auto")}
)


def run(x: Tensor, **options: Any) -> tuple[Tensor, FlexPrefillBackend, list[Tensor]]:
    """Prefill a model of two layers with four heads; return its output, its backend and the densities."""
    torch.manual_seed(0)
    model, backend = TwoLayers().eval(), FlexPrefillBackend()
    with torch.no_grad(), record_densities() as densities:
        return torch.compile(model, backend=backend, options=OPTIONS | options)(x), backend, densities


def test_a_policy_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    policy = Policy(SHAPE, {0: LayerPolicy(dense=True), **dict(POLICY.layers)})
    policy.save(path)
    assert Policy.load(path) == policy
    assert hash(Policy.load(path)) == hash(policy)
    assert SparsePrefillConfig(policy=str(path)) == SparsePrefillConfig(policy=policy)


GOOD: dict[str, Any] = {
    "format": 1,
    "model": {"architecture": "A", "num_layers": 2, "num_heads": 4},
    "layers": {"0": {"gamma": 0.9}},
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "holds no policy: Expecting property name"),
        ("[]", 'it must be a JSON object with "format": 1'),
        (GOOD | {"format": 2}, 'it must be a JSON object with "format": 1'),
        ({"format": 1, "model": GOOD["model"]}, "'layers' is missing"),
        (
            GOOD | {"model": {"architecture": "A", "num_layers": 0, "num_heads": 4}},
            "num_layers must be a number of layers",
        ),
        (GOOD | {"layers": {"0": {"gamma": 1.5}}}, r"gamma must be in \(0, 1\], got 1.5"),
        (GOOD | {"layers": {"0": {"gamma": [0.5, 0.5]}}}, "gamma of layer 0 must be one number or 4, got 2 numbers"),
        (GOOD | {"layers": {"0": {"tau": -1}}}, r"tau must be in \[0, 1\], got -1"),
        (GOOD | {"layers": {"0": {"min_budget": 9, "max_budget": 8}}}, "max_budget must be None or a number of tokens"),
        (GOOD | {"layers": {"0": {"estimator": "oracle"}}}, "estimator must be one of pooled, flexprefill"),
        (GOOD | {"layers": {"0": {"dense": 1}}}, "dense must be True or False, got 1"),
        (GOOD | {"layers": {"0": {"gama": 1}}}, "unexpected keyword argument 'gama'"),
        (GOOD | {"layers": {"2": {}}}, "a layer of the policy must be from 0 to 1, got 2"),
        (GOOD | {"layers": {"first": {}}}, "invalid literal for int"),
    ],
)
def test_a_file_that_holds_no_policy_is_refused_in_one_sentence(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "policy.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InvalidOptionError, match=message) as raised:
        SparsePrefillConfig(policy=path)
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "no such file"}, "no such file holds no policy: .*No such file"),
        ({"policy": 3}, "policy must be None, a Policy or the path of its file, got 3"),
        ({"gamma": []}, "gamma must be in .*, one number or one for each query head, got"),
        ({"gamma": (0.5, 2)}, "gamma must be in .*, one number or one for each query head, got"),
        ({"dense_last": -1}, "dense_last must be a number of tokens, at least 0, got -1"),
        ({"dense_layers": 3}, "dense_layers must be numbers of layers, each at least 0, got 3"),
        ({"dense_layers": (-1,)}, "dense_layers must be numbers of layers, each at least 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        SparsePrefillConfig(**options)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.self_attn", 3),
        ("model.layers[12].attn2", 12),
        ("transformer.h.0.mlp.7", 0),
        ("getattr(model.layers, '5')", 5),
        ("layers[12]", 12),
        ("layers[12].attn2", 12),
        ("models[1].layers.3", None),
        ("scaled_dot_product_attention_1", None),
        ("attention2d", None),
    ],
)
def test_the_number_of_a_layer_is_the_first_in_its_path(name: str, layer: int | None) -> None:
    assert number_layer(name) == layer


def test_a_layer_takes_from_the_config_what_it_does_not_set() -> None:
    config = SparsePrefillConfig(gamma=0.9, min_length=64, policy=POLICY, dense_layers=(0,))
    assert config_for_layer(config, 0, 4) is None
    of_layer = config_for_layer(config, 1, 4)
    assert of_layer is not None
    assert (of_layer.gammas, of_layer.tau, of_layer.min_budget) == ([0.5, 0.6, 0.7, 1.0], 0.2, 64)
    assert (of_layer.max_budget, of_layer.estimator, of_layer.min_length) == (256, "auto", 64)
    with pytest.raises(InvalidOptionError, match=r"layer 1 of the policy: max_budget must be .* at least min_budget"):
        config_for_layer(
            SparsePrefillConfig(min_budget=128, policy=Policy(SHAPE, {1: LayerPolicy(max_budget=64)})), 1, 4
        )


def test_layers_and_heads_run_by_their_own_settings() -> None:
    x = torch.randn(1, 300, 64)
    policy = Policy(SHAPE, {0: LayerPolicy(dense=True), **dict(POLICY.layers)})
    actual, backend, densities = run(x, policy=policy)
    assert [site.reason for site in backend.report.sites] == [SkipReason.DENSE_LAYER, None]
    by_option, _, again = run(
        x, dense_layers=[0], gamma=[0.5, 0.6, 0.7, 1.0], tau=0.2, min_budget=64, max_budget=256, estimator="auto"
    )
    assert torch.equal(actual, by_option)
    assert len(densities) == len(again) == 1
    assert torch.equal(again[0], densities[0])
    assert len(set(densities[0][0].tolist())) > 1, "the scenario: heads differ"


def test_dense_layers_pass_where_skips_raise() -> None:
    x = torch.randn(1, 300, 64)
    actual, backend, densities = run(x, dense_layers=(0, 1), on_skip="raise", gamma=0.1)
    torch.manual_seed(0)
    torch.testing.assert_close(actual, TwoLayers().eval()(x), rtol=1e-4, atol=1e-5)
    assert backend.report.num_rewritten == 0
    assert densities == []


def test_the_last_queries_and_heads_of_gamma_1_are_dense() -> None:
    x = torch.randn(1, 300, 64)
    torch.manual_seed(0)
    expected = TwoLayers().eval()(x)
    actual = run(x, gamma=(1.0,) * 4, dense_last=40)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    sparse, _, fewer = run(x, gamma=0.3, estimator="streaming", dense_layers=(0,), dense_last=40)
    assert (fewer[0] < 1).all()
    torch.testing.assert_close(sparse[:, -40:], expected[:, -40:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sparse, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"policy": Policy(ModelShape(architecture="A", num_layers=30, num_heads=9))},
            r"^policy is for a model of 30 layers with 9 heads \(A\), got 30 layers with 4 heads$",
        ),
        (
            {"policy": Policy(ModelShape(architecture="A", num_layers=3, num_heads=4))},
            r"^policy is for a model of 3 layers with 4 heads \(A\), got 2 layers with 4 heads$",
        ),
        (
            {"policy": Policy(ModelShape(architecture="A", num_layers=1, num_heads=4))},
            r"^policy is for a model of 1 layers with 4 heads \(A\), got 2 layers with 4 heads$",
        ),
        ({"gamma": (0.5, 0.5)}, r"^gamma must be one number or one for each of 4 query heads, got 2 numbers$"),
    ],
)
def test_settings_for_another_model_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        run(torch.randn(1, 300, 64), **options)


def test_a_policy_holds_across_graph_breaks() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = TwoLayers()

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner.layers[0](x)
            torch._dynamo.graph_break()
            return self.inner.layers[1](x)

    backend = FlexPrefillBackend()
    with torch.no_grad():
        torch.compile(Broken(), backend=backend, options=OPTIONS | {"policy": POLICY})(torch.randn(1, 300, 64))
    assert backend.report.num_rewritten == 2


# Estimators that users bring


def score_pools(inputs: EstimatorInputs) -> Tensor:
    return (inputs.pooled_query @ inputs.pooled_key.mT * inputs.scale).softmax(-1)


def make_estimator(factor: float) -> Any:
    def score(inputs: EstimatorInputs) -> Tensor:
        return factor * score_pools(inputs)

    return score


def test_a_function_is_registered_under_its_qualified_name() -> None:
    config = SparsePrefillConfig(estimator=score_pools)
    assert config.estimator == f"{__name__}.score_pools"
    assert SparsePrefillConfig(estimator=score_pools) == config
    assert SparsePrefillConfig(estimator=config.estimator) == config
    first, second = make_estimator(1.0), make_estimator(2.0)
    assert name_estimator(first) != name_estimator(second)
    assert name_estimator(first) == name_estimator(first)
    for name, function in [("auto", score_pools), ("", score_pools), ("new", None)]:
        with pytest.raises(InvalidOptionError):
            register_estimator(name, function)  # type: ignore[arg-type]
    register_estimator("mine", first)
    register_estimator("mine", first)
    with pytest.raises(InvalidOptionError, match="an estimator 'mine' exists already: choose another name"):
        register_estimator("mine", second)


def test_a_function_chooses_the_blocks_of_a_compiled_model() -> None:
    x = torch.randn(1, 300, 64)
    calls = []

    def score(inputs: EstimatorInputs) -> Tensor:
        calls.append(inputs.shape)
        return torch.where(torch.arange(inputs.shape[-1]) == 3, 1.0, -1.0).expand(inputs.shape)

    _, _, densities = run(x, estimator=score, gamma=0.9)
    assert calls == [(1, 4, 10, 10)] * 2
    # Of 10 rows: the sink, the diagonal, and block 3 in the six rows below it.
    assert torch.equal(densities[0], torch.full((1, 4), (10 + 9 + 6) / 55))


def test_scores_that_are_not_finite_mean_every_block() -> None:
    query = torch.randn(1, 2, 100, 16)

    def score(inputs: EstimatorInputs) -> Tensor:
        scores = torch.zeros(inputs.shape)
        scores[:, 1, 3, 2] = torch.nan
        return scores

    config = SparsePrefillConfig(estimator=score, min_budget=0, block_size=16)
    selected = select_prefill_blocks(query, query, None, 1.0, config)
    causal = create_causal_grid(7, query.device)
    assert torch.equal(selected[0, 1], causal)
    assert selected[0, 0].sum() == 7 + 6


@pytest.mark.parametrize("wrong", [None, torch.zeros(1, 2, 7, 6), torch.zeros(1, 2, 7, 7, dtype=torch.int64)])
def test_what_is_no_score_is_refused(wrong: Any) -> None:
    query = torch.randn(1, 2, 100, 16)
    config = SparsePrefillConfig(estimator=lambda inputs: wrong, min_budget=0, block_size=16)
    with pytest.raises(ValueError, match=r"must return floating point scores of shape \(1, 2, 7, 7\), got"):
        select_prefill_blocks(query, query, None, 1.0, config)
