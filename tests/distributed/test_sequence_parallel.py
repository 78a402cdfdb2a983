"""A prompt over several ranks is prefilled as in one process, block for block."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.distributed import prefills
from helpers.distributed.pool import RankPool


def check(results: list[Any], *, is_sparse: bool, num_calls: int = 2) -> None:
    for result in results:
        assert isinstance(result, dict), result
        assert result["error"] < 1e-5
        assert result["same_blocks"]
        assert result["rewritten"] == num_calls
        assert (result["density"] < 0.95) == is_sparse


def test_gamma_1_is_dense_attention(ranks: RankPool) -> None:
    check(ranks.run(prefills.spread_layers, 1.0, False), is_sparse=False)


@pytest.mark.parametrize(("size", "dynamic"), [(2, True), (4, False)])
def test_selection_is_that_of_one_process_with_a_gamma_for_each_head(ranks: RankPool, size: int, dynamic: bool) -> None:
    results = ranks.run(prefills.spread_layers, (0.5, 0.9, 0.7, 0.3), dynamic, size=size)
    check(results, is_sparse=True)
    # On 4 ranks two ranks share each of the two key heads.
    assert all(result["keys"].split("x")[1] == "1" for result in results)


# On 4 ranks two ranks share each of the two key heads, those of earlier chunks too.
@pytest.mark.parametrize(
    ("kind", "dynamic", "size"), [("causal", False, 4), ("padding", True, 2), ("packing", False, 2)]
)
def test_a_hugging_face_model_in_chunks_with_padding_and_packing_then_a_token(
    ranks: RankPool, kind: str, dynamic: bool, size: int
) -> None:
    results = ranks.run(prefills.spread_llama, kind, dynamic, size=size)
    check(results, is_sparse=True, num_calls=2 if kind == "packing" else 4)
    assert all(result["decode_error"] < 1e-5 for result in results)
