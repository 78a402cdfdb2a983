"""audit: what it says of a compiled prefill is what a float64 computation with all scores says of the same rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checked_attention import without_code_generation
from helpers.command_line import one_sentence
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from flexprefill_compile import AuditReport, SparsePrefillConfig, audit
from flexprefill_compile.block_masks.estimators.flexprefill.masked_representative import ScoreRule
from flexprefill_compile.block_masks.layout import BlockTables, unpack_blocks
from flexprefill_compile.block_masks.observed_attention import ObservedAttention, sample_rows
from flexprefill_compile.block_masks.prefill import select_prefill_blocks
from flexprefill_compile.commands.cli import main
from flexprefill_compile.errors import UsageError
from flexprefill_compile.quality.audit.attention_call import measure_call
from flexprefill_compile.quality.audit.audit import measure_shorter_prompts
from flexprefill_compile.quality.audit.observe import prefill_observed
from flexprefill_compile.quality.prefill import Prompt

LENGTH = 200
BLOCK = 16
OPTIONS: dict[str, Any] = {"block_size": BLOCK, "min_budget": 0, "gamma": 0.7}
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,  # at the default, attention is nearly uniform and tells little
}


def llama(**sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | sizes)).eval()


def gemma() -> nn.Module:
    """Softcapped scores, and a window of 70 in the first layer."""
    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(**SIZES, sliding_window=70, attn_logit_softcapping=2.0, attn_implementation="eager")
    ).eval()


def tokens(batch: int = 1, length: int = LENGTH) -> Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(1))


def padding() -> Tensor:
    """One prompt is padded on the left, one on the right, where padding sees tokens and still must not count."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :77] = 0
    mask[1, 150:] = 0
    return mask


def brute_force(call: ObservedAttention, mask: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Return recall (B, H, S) and error (B, H, S, 2) of all rows with all scores at once, in float64.

    Args:
        call: What was observed.
        mask: (B, 1, S, S) bool, what the model's attention means.
        softcap: Of the scores.
    """
    group = call.query.shape[1] // call.key.shape[1]
    key, value = (x.double().repeat_interleave(group, dim=1) for x in (call.key, call.value))
    scores = call.query.double() @ key.mT * call.rule.scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0)
    num_blocks = -(-call.key.shape[2] // BLOCK)
    tables = call.tables
    blocks = unpack_blocks(tables.kv_num_blocks, tables.kv_indices, num_blocks) | unpack_blocks(
        tables.full_kv_num_blocks, tables.full_kv_indices, num_blocks
    )
    selected = blocks.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[..., : mask.shape[-2], : mask.shape[-1]]
    kept = weights * selected
    recall = kept.sum(-1)
    sparse = kept @ value / recall.clamp(min=1e-9).unsqueeze(-1)
    dense = weights @ value
    return recall, torch.stack([(sparse - dense).square().sum(-1), dense.square().sum(-1)], dim=-1)


def causal(length: int = LENGTH) -> Tensor:
    return torch.ones(1, 1, length, length, dtype=torch.bool).tril()


def windowed() -> Tensor:
    return causal() & ~causal().tril(-70)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], list[Tensor], float | None]] = {
    "plain": (lambda: llama(num_key_value_heads=4, num_hidden_layers=1), {}, [causal()], None),
    "gqa": (llama, {}, [causal()] * 2, None),
    "padded": (llama, {"attention_mask": padding()}, [causal() & padding().bool()[:, None, None]] * 2, None),
    "window and softcap": (gemma, {}, [windowed(), causal()], 2.0),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_recall_and_error_are_those_of_a_brute_force_computation(case: str) -> None:
    make, kwargs, masks, softcap = CASES[case]
    prompt = Prompt((tokens(2 if kwargs else 1),), kwargs)
    compared: list[bool] = []

    def compare(call: ObservedAttention) -> None:
        measured = measure_call(call, BLOCK)
        recall, squares = brute_force(call, masks[len(compared)], softcap)
        is_counted = padding().bool()[:, call.rows] if kwargs else torch.ones(1, len(call.rows), dtype=torch.bool)
        assert torch.equal(measured.is_counted, is_counted)
        expected = recall[:, :, call.rows]
        heads = is_counted.unsqueeze(1).expand_as(expected)
        assert_close(measured.recall[heads].double(), expected[heads], rtol=1e-4, atol=1e-5)
        totals = (squares[:, :, call.rows] * heads.unsqueeze(-1)).sum((0, 2))
        assert_close(measured.error.double(), (totals[:, 0] / totals[:, 1]).sqrt(), rtol=1e-3, atol=1e-5)
        assert measured.error.max() > 0.01, "nothing is lost, so that nothing is tested"
        compared.append(True)

    with without_code_generation(is_dense=False):
        prefill_observed(make(), prompt, OPTIONS | {"min_length": 32}, compare, num_rows=48)
    assert len(compared) == len(masks)


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
    files = report.save_plots(tmp_path / "plots")
    assert [file.name for file in files][:2] == ["heads.png", "blocks.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


@pytest.mark.parametrize(("count", "length"), [(1, 1), (7, 7), (50, 7), (7, 50), (64, 8192), (3, 2**20 + 1)])
def test_sampled_rows_are_spread_and_differ(count: int, length: int) -> None:
    rows = sample_rows(count, length, torch.device("cpu"))
    stretch = torch.arange(min(count, length), dtype=torch.float64) * length / min(count, length)
    assert len(rows) == min(count, length)
    assert (rows.diff() > 0).all()
    assert (rows >= stretch.long()).all()
    assert rows[-1] < length


def test_an_observed_call_passes_opcheck() -> None:
    query, key = torch.randn(1, 4, 64, 16), torch.randn(1, 2, 64, 16)
    tables = [torch.zeros(1, 4, 4, dtype=torch.int32), torch.zeros(1, 4, 4, 4, dtype=torch.int32)] * 2
    rows = sample_rows(8, 64, query.device)
    arguments = (
        torch.randn(1, 4, 64, 16),
        query,
        key,
        key,
        tables,
        [],
        None,
        rows,
        None,
        None,
        0.25,
        None,
        "attention",
    )
    torch.library.opcheck(torch.ops.flexprefill.observe.default, arguments)


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


# The command


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("Everyone is permitted to copy and distribute verbatim copies of this license document.\n" * 20)
    return file


def test_the_command_prints_a_table_and_writes_files(
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["audit", "--model", str(model_folder), "--text", str(text_file), "--tokens", "300"]
    selection = ["--gamma", "0.8", "--min-budget", "0", "--block-size", "32", "--estimator", "flexprefill"]
    outputs = ["--rows", "16", "--json", str(tmp_path / "audit.json"), "--plots", str(tmp_path / "plots")]
    assert main([*arguments, *selection, *outputs]) == 0
    printed = capsys.readouterr().out
    written = AuditReport.from_json((tmp_path / "audit.json").read_text())
    assert "text.txt: 300 tokens" in printed
    assert str(written) in printed
    assert written.options["gamma"] == 0.8
    assert math.isfinite(written.predictions.perplexity_ratio)
    assert (tmp_path / "plots" / "heads.png").exists()


def test_the_command_gives_one_sentence_for_each_mistake(
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["audit", "--model", str(model_folder), "--text", str(text_file)]
    mistakes = {
        ("--tokens", "200"): "the text must be of two blocks at least, 256 tokens, got 200",
        ("--gamma", "2"): "gamma must be in (0, 1], got 2.0",
        ("--estimator", "guess"): "estimator must be ",
        ("--json", "/nowhere/audit.json"): "can't write /nowhere/audit.json: there is no folder /nowhere",
    }
    for mistake, message in mistakes.items():
        assert main([*arguments, *mistake]) == 2
        assert one_sentence(capsys).startswith(message)
