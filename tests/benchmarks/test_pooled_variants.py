"""The variants of the pooled estimator: (8, 32) is the estimator itself, and each is a method of bench-real."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.inputs import random_qk

from flexprefill_compile.block_masks.estimators.inputs import EstimatorInputs
from flexprefill_compile.block_masks.estimators.pooled import score_pooled
from flexprefill_compile.block_masks.layout import create_causal_grid


@pytest.fixture(autouse=True)
def beside_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def test_every_variant_shares_out_each_row_and_one_is_the_estimator() -> None:
    from pooled_variants import VARIANTS  # noqa: PLC0415

    query, key = random_qk(0, 1, 4, 2, 500, 16, spread=2, dtype=torch.float32)
    inputs = EstimatorInputs(query, key, 0.25, 128, create_causal_grid(4, query.device)[None, None])
    shares = {name: variant(inputs) for name, variant in VARIANTS.items()}
    for share in shares.values():
        torch.testing.assert_close(share.sum(-1), torch.ones(1, 4, 4))
    own = score_pooled(inputs)
    assert [name for name, share in shares.items() if torch.equal(share, own)] == ["queries-8-keys-32"]


def test_each_setting_is_a_method_of_bench_real() -> None:
    from pooled_variants import list_arguments  # noqa: PLC0415

    arguments = "--variants queries-4-keys-16 --gamma 0.8 0.9 --min-budget 512 --lengths 8192"
    assert list_arguments(arguments.split()) == [
        "bench-real",
        *("--lengths", "8192"),
        *("--sparse", "estimator=queries-4-keys-16,gamma=0.8,min_budget=512,block_size=64"),
        *("--sparse", "estimator=queries-4-keys-16,gamma=0.9,min_budget=512,block_size=64"),
    ]
