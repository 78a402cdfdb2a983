"""``audit``: its report speaks of every call and head, and of the model's predictions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.audited_models import LENGTH, OPTIONS, llama, tokens
from helpers.checked_attention import without_code_generation
from torch import Tensor, nn
from torch.nn import functional as F

from flexprefill_compile import AuditReport, SparsePrefillConfig, audit
from flexprefill_compile.block_masks.estimators.flexprefill.masked_representative import ScoreRule
from flexprefill_compile.block_masks.layout import BlockTables
from flexprefill_compile.block_masks.observed_attention import ObservedAttention
from flexprefill_compile.block_masks.prefill import select_prefill_blocks
from flexprefill_compile.errors import UsageError
from flexprefill_compile.quality.audit.audit import measure_shorter_prompts


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return llama()


@pytest.fixture(scope="module")
def report(model: nn.Module) -> AuditReport:
    torch.compiler.reset()
    return audit(model, tokens(), options=OPTIONS, rows=60)


def test_the_report_speaks_of_every_call_and_head(report: AuditReport) -> None:
    assert [call.name for call in report.calls] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert [len(call.heads) for call in report.calls] == [4, 4]
    for head in (head for call in report.calls for head in call.heads):
        assert (head.pattern == "query-aware") == (head.distance < SparsePrefillConfig.tau)
        assert 0 < head.density < 1
        assert head.recall_worst <= head.recall_p10 <= head.recall_mean <= 1
    assert report.options == OPTIONS | {"min_length": 32}
    assert report.shorter_prompts == {LENGTH: report.mean("density")}
    text = str(report)
    for words in ("perplexity ratio", "top-1 agreement", "model.layers.1.self_attn", "heads of least recall"):
        assert words in text


def test_the_predictions_are_those_of_the_model(model: nn.Module, report: AuditReport) -> None:
    ids = tokens()
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].double()
    assert report.predictions.num_tokens == LENGTH - 1
    assert report.predictions.dense_loss == pytest.approx(F.cross_entropy(logits, ids[0, 1:]).item(), rel=1e-5)
    assert report.predictions.divergence > 0
    assert 0 < report.predictions.agreement < 1


def test_shorter_prompts_are_selected_for_as_prompts_of_their_own() -> None:
    query, key = torch.randn(1, 4, 512, 16), torch.randn(1, 2, 512, 16)
    config = SparsePrefillConfig(**OPTIONS)
    tables = BlockTables(*[torch.zeros(0)] * 4)
    call = ObservedAttention(
        "attention", query, query, key, key, tables, None, ScoreRule(0.5), torch.arange(1), visible=None, row_bias=None
    )
    expected = {}
    for length in (256, 128):
        blocks = select_prefill_blocks(query[:, :, :length], key[:, :, :length], None, 0.5, config)
        num_causal = blocks.shape[-1] * (blocks.shape[-1] + 1) / 2
        expected[length] = pytest.approx((blocks.sum((-2, -1)) / num_causal).mean().item())
    assert measure_shorter_prompts(call, config) == expected


def test_json_gives_the_report_back(report: AuditReport) -> None:
    assert AuditReport.from_json(report.to_json()) == report
    assert json.loads(report.to_json())["predictions"]["perplexity_ratio"] == report.predictions.perplexity_ratio


def test_gamma_1_loses_nothing(model: nn.Module) -> None:
    steps: list[str] = []
    with without_code_generation():
        dense = audit(model, tokens(), options=OPTIONS | {"gamma": 1.0}, rows=20, progress=steps.append)
    assert dense.mean("density") == 1
    assert dense.mean("recall_mean") == pytest.approx(1)
    assert dense.mean("error") < 1e-5
    assert dense.predictions.perplexity_ratio == pytest.approx(1, abs=1e-4)
    assert dense.predictions.divergence == pytest.approx(0, abs=1e-5)
    assert steps[:2] == ["dense prefill", "compiling"]
    assert "attention call 2: model.layers.1.self_attn" in steps


def test_plots_are_written(report: AuditReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from flexprefill_compile.quality.audit.plots import save_plots  # noqa: PLC0415

    files = save_plots(report, tmp_path / "plots")
    assert [file.name for file in files][:2] == ["heads.png", "blocks.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


# Mistakes


class Encoder(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        return torch.zeros(ids.shape[0], 5)


class Bidirectional(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        x = F.one_hot(ids, 64).float().unsqueeze(1)
        return F.scaled_dot_product_attention(x, x, x).squeeze(1)


@pytest.mark.parametrize(
    ("make", "inputs", "message"),
    [
        (Encoder, (tokens(),), r"must be a causal language model, with logits of .*, got \(1, 5\)"),
        (Bidirectional, (tokens(),), "no attention call was rewritten: not causal"),
        (llama, (tokens(length=31),), "two blocks at least, 32 tokens, got 31"),
        (llama, (torch.randn(1, 64),), "must be a .batch, length. tensor of token numbers"),
        (llama, (), "must be a .batch, length. tensor of token numbers"),
    ],
)
def test_a_mistake_gives_one_sentence(make: Callable[[], nn.Module], inputs: tuple[Any, ...], message: str) -> None:
    with without_code_generation(), pytest.raises(UsageError, match=message):
        audit(make(), *inputs, options=OPTIONS)
