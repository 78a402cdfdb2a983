"""Every family of causal language models runs right, rewritten or not, and docs/models.md says what became of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checked_attention import TableError, without_code_generation
from helpers.zoo.checks import check_family
from helpers.zoo.models import CLASS_NAMES as MAPPING
from helpers.zoo.models import FAMILIES, LEFT_OUT, THOROUGH, VOCABULARY, build_model
from helpers.zoo.table import VERSIONS, describe_family, format_row, installed_versions
from torch.fx import GraphModule
from torch.torch_version import TorchVersion

import flexprefill_compile.backend as backend_module
from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.passes.base import graph_modules
from flexprefill_compile.torch_internals import flex_attention_hop

pytestmark = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.12", reason="before, transformers passes an explicit mask when compiled"
)

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
NAMED = {  # the families that have to be in the zoo, whatever else is
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi3", "glm4"),
    *("granite", "olmo2", "cohere2", "falcon", "falcon, alibi", "stablelm", "starcoder2", "gpt2", "gpt_neox", "opt"),
    *("bloom", "mpt", "gptj", "codegen", "persimmon"),
}
LENGTHS = [("llama", False), ("llama", True), ("mistral", False), ("gemma3_text", True), ("qwen3", False)]
INDUCTOR = ("llama",)


def test_the_zoo_has_every_class_or_a_reason_why_not() -> None:
    left_out = [model_type for model_types in LEFT_OUT.values() for model_type in model_types]
    built = {family.model_type for family in FAMILIES.values()}
    assert len(left_out) == len(set(left_out))
    assert built | set(left_out) >= set(MAPPING)
    assert not built & set(left_out)
    assert FAMILIES.keys() >= NAMED


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_runs_right_and_as_the_docs_say(name: str) -> None:
    family = FAMILIES[name]
    with without_code_generation():
        phases = check_family(build_model(family), is_thorough=name in THOROUGH)
    assert phases["prefill"].calls > 0, "nothing to rewrite: no family of the zoo"
    if is_page_of_these_versions():
        row = format_row(describe_family(family, phases))
        assert row in PAGE.read_text().splitlines(), "docs/models.md is out of date: run make models"


def is_page_of_these_versions() -> bool:
    """Tell whether the page was written with the installed versions, so that its rows should be the same."""
    return VERSIONS.format(**installed_versions()) in PAGE.read_text()


def test_the_page_has_a_row_for_every_family() -> None:
    rows = [line.split(" | ")[0].removeprefix("| ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert rows[1:] == list(FAMILIES)


@pytest.mark.parametrize("name", INDUCTOR)
def test_a_family_runs_right_with_inductor(name: str) -> None:
    check_family(build_model(FAMILIES[name]))


@pytest.mark.parametrize(("name", "padded"), LENGTHS)
def test_lengths_in_any_order_make_two_prefill_graphs(name: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "compile_with_inductor", run_with_zeros_for_attention)
    backend = FlexPrefillBackend()
    model = build_model(FAMILIES[name])
    compiled = torch.compile(model, backend=backend, dynamic=True, options={"min_length": 1024})
    for length in (512, 1024, 640, 4096, 777):
        tokens = torch.randint(3, VOCABULARY, (2, length))
        mask = torch.ones_like(tokens).tril(length - 2) if padded else None
        with torch.no_grad():
            compiled(tokens, attention_mask=mask, use_cache=True)
    num_layers = model.config.num_hidden_layers
    assert num_layers <= len(backend.report.sites) <= 2 * num_layers


def test_tables_that_leave_a_block_out_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    select = torch.ops.flexprefill.select_blocks.default

    def run_with_a_block_less(graph_module: GraphModule, *_: Any) -> Callable[..., Any]:
        for node in graph_module.graph.find_nodes(op="call_function", target=select):
            node.target = lambda *args: _drop_the_last_diagonal_block(select(*args))
        return run_checked(graph_module, [], {})

    with without_code_generation(), monkeypatch.context() as patched:  # undone before what it stands on
        run_checked = backend_module.compile_with_inductor
        patched.setattr(backend_module, "compile_with_inductor", run_with_a_block_less)
        with pytest.raises(TableError, match="in no block"):
            check_family(build_model(FAMILIES["llama"]))


def test_a_result_that_is_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "compile_with_inductor", run_with_zeros_for_attention)
    with pytest.raises(AssertionError, match="prefill: relative error"):
        check_family(build_model(FAMILIES["llama"]))


def run_with_zeros_for_attention(graph_module: GraphModule, *_: Any) -> Callable[..., Any]:
    """Stand in for inductor where only the number of graphs counts: rewritten attention costs nothing."""
    for module in graph_modules(graph_module):
        for node in module.graph.find_nodes(op="call_function", target=flex_attention_hop):
            node.target = _zeros_like_attention
        module.recompile()
    return graph_module.forward


def _zeros_like_attention(query: Any, key: Any, value: Any, *_: Any) -> tuple[torch.Tensor]:
    return (query.new_zeros(*query.shape[:-1], value.shape[-1]),)


def _drop_the_last_diagonal_block(tables: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    counts = tables[0].clone()
    counts[..., -1] -= 1
    return counts, *tables[1:]
