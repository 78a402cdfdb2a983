"""A layer's heads over several ranks: settings by head and by layer are those of the whole model."""

from __future__ import annotations

import pytest
from helpers.distributed import prefills
from helpers.distributed.pool import RankPool

from flexprefill_compile import InvalidOptionError, LayerPolicy, ModelShape, Policy, SparsePrefillConfig
from flexprefill_compile.passes.layer_config import config_for_layer

GAMMAS = (0.5, 0.9, 0.7, 0.3, 0.8, 0.4, 0.6, 0.95)
MODEL = ModelShape(architecture="LlamaForCausalLM", num_layers=2, num_heads=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    prefills.create_llama(kv_heads=4).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("size", "dense_layers"), [(2, ()), (4, (0,))])
def test_a_policy_means_the_heads_and_layers_of_the_whole_model(
    ranks: RankPool, folder: str, size: int, dense_layers: tuple[int, ...]
) -> None:
    policy = Policy(MODEL, {1: LayerPolicy(gamma=GAMMAS)})
    options = {"policy": policy, "gamma": 0.5, "dense_layers": dense_layers}
    for result in ranks.run(prefills.shard_transformers, folder, options, not dense_layers, size=size):
        assert isinstance(result, dict), result
        assert result["rewritten"] == [0 not in dense_layers, True]
        assert result["error"] < 1e-5
        assert result["same_blocks"]


def test_tensor_and_sequence_parallel_on_a_mesh(ranks: RankPool) -> None:
    for result in ranks.run(prefills.shard_and_spread, {"gamma": GAMMAS}, size=4):
        assert isinstance(result, dict), result
        assert result["rewritten"] == 2
        assert result["error"] < 1e-5
        assert result["same_blocks"]


def test_a_policy_of_the_whole_model_on_a_shard_asks_for_the_option() -> None:
    with pytest.raises(InvalidOptionError, match="tensor_parallel"):
        config_for_layer(SparsePrefillConfig(policy=Policy(MODEL)), 0, num_heads=4)
    with pytest.raises(InvalidOptionError, match="tensor_parallel"):
        config_for_layer(SparsePrefillConfig(gamma=GAMMAS), 0, num_heads=4)
