"""Exported programs: equal to dense attention at gamma 1, the blocks of the compiled model below, in any process."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checked_attention import without_code_generation
from helpers.models import OPTIONS, TwoLayers, relative_error
from helpers.tiny_model import create_tiny_llama
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from flexprefill_compile import (
    AttentionSkippedError,
    InvalidOptionError,
    SkipReason,
    export,
    export_report,
)
from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.block_masks import record_densities
from flexprefill_compile.errors import UsageError

SPARSE: dict[str, Any] = OPTIONS | {"gamma": 0.5, "check_masks": False}
EXACT: dict[str, Any] = SPARSE | {"gamma": 1.0}
LENGTHS = {1: Dim("length", min=64, max=4096)}
QUICK = {"aot_inductor.compile_wrapper_opt_level": "O0"}  # of the C++ around the kernels

# What a process needs to run a saved program: torch, and one import.
RUN_SAVED = """
import sys, torch, flexprefill_compile
inputs = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(torch.export.load(sys.argv[1]).module()(*inputs), sys.argv[3])
assert "transformers" not in sys.modules
"""


class Logits(nn.Module):
    """A Llama of one layer that takes and returns tensors alone."""

    def __init__(self) -> None:
        super().__init__()
        self.model = create_tiny_llama(num_layers=1)

    def forward(self, input_ids: Tensor, is_token: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids, attention_mask=is_token, use_cache=False).logits
        return logits


def create_prompts(length: int) -> tuple[Tensor, Tensor]:
    """Return two prompts and their mask: the first is padded on the right, the second on the left."""
    generator = torch.Generator().manual_seed(length)
    position = torch.arange(length)
    is_token = torch.stack([position < length - 40, position >= 32]).long()
    return torch.randint(0, 256, (2, length), generator=generator), is_token


@pytest.fixture(scope="module")
def model() -> Logits:
    return Logits()


def export_llama(model: Logits, options: dict[str, Any]) -> ExportedProgram:
    shapes = {"input_ids": LENGTHS, "is_token": LENGTHS}
    program = export(model, *create_prompts(128), options=options, dynamic_shapes=shapes)
    assert export_report(program).num_rewritten == 1
    return program


def test_a_saved_program_runs_in_a_fresh_process_and_is_dense_attention_at_gamma_1(
    model: Logits, tmp_path: Path
) -> None:
    saved, inputs, output = (tmp_path / name for name in ("program.pt2", "inputs.pt", "output.pt"))
    torch.export.save(export_llama(model, EXACT), saved)
    prompts = create_prompts(333)
    torch.save(prompts, inputs)
    subprocess.run([sys.executable, "-c", RUN_SAVED, saved, inputs, output], check=True)
    is_token = prompts[1].bool()
    with torch.no_grad():
        torch.testing.assert_close(torch.load(output)[is_token], model(*prompts)[is_token], rtol=1e-4, atol=1e-5)


def test_a_program_and_its_package_select_the_blocks_of_the_compiled_model(model: Logits, tmp_path: Path) -> None:
    prompts = create_prompts(333)
    is_token = prompts[1].bool()
    program = export_llama(model, SPARSE)
    backend = FlexPrefillBackend()
    with torch.no_grad(), fresh_cache():
        path = str(tmp_path / "package.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=QUICK)
        package = torch._inductor.aoti_load_package(path)
        compiled = torch.compile(model, backend=backend, options=SPARSE, dynamic=True)
        with without_code_generation(is_dense=False):
            first = run_and_record(compiled, prompts)
        others = [run_and_record(run, prompts) for run in (program.module(), package)]
        outputs, densities = zip(first, *others, strict=True)
        dense = model(*prompts)
    assert backend.report.num_rewritten == 1
    assert densities[0].mean() < 0.9
    for density, output in zip(densities[1:], outputs[1:], strict=True):
        assert torch.equal(density, densities[0])
        torch.testing.assert_close(output[is_token], outputs[0][is_token], rtol=1e-4, atol=1e-5)
    assert relative_error(outputs[0][is_token], dense[is_token].double()) > 1e-3  # or all blocks would pass


def run_and_record(run: Callable[..., Tensor], prompts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    with record_densities() as densities:
        output = run(*prompts)
    (density,) = densities
    return output, density


class Attention(nn.Module):
    """Attention alone, whose output is that of the program."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


class Window(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        position = torch.arange(query.shape[2])
        distance = position[:, None] - position
        mask = (distance >= 0) & (distance < 50)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


class SoftcapAndBias(nn.Module):
    """Softcap, then ALiBi: a score_mod and a mask_mod with captures, and attention that is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125, 0.0625]))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
        position = torch.arange(query.shape[2])
        distance = position - position[:, None]
        scores = 5 * torch.tanh(query @ key.transpose(-2, -1) / 4 / 5) + self.slopes[:, None, None] * distance
        return scores.masked_fill(distance > 0, -torch.inf).softmax(-1) @ value


class Sinks(nn.Module):
    """Attention with sinks, as gpt-oss writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 0.0]))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
        position = torch.arange(query.shape[2])
        logits = (query @ key.transpose(2, 3) / 4).masked_fill(position > position[:, None], -torch.inf)
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[-2], -1)
        joined = torch.cat([logits, sinks], dim=-1)
        weights = F.softmax(joined - joined.max(dim=-1, keepdim=True).values, dim=-1)
        return weights[..., :-1] @ value


@pytest.mark.parametrize("attention", [Attention, Window, SoftcapAndBias, Sinks], ids=lambda kind: kind.__name__)
def test_every_form_of_attention_is_exact_at_gamma_1_at_another_length(attention: type[nn.Module]) -> None:
    model = attention()

    def create(length: int) -> list[Tensor]:
        return [torch.randn(2, heads, length, 16) for heads in (4, 2, 2)]

    length = {2: LENGTHS[1]}
    program = export(
        model, *create(128), options=EXACT, dynamic_shapes={"query": length, "key": length, "value": length}
    )
    assert export_report(program).num_rewritten == 1, export_report(program)
    inputs = create(333)
    with torch.no_grad():
        assert relative_error(program.module()(*inputs), model(*inputs).double()) < 1e-5


def test_what_is_not_proven_for_all_lengths_stays_dense_with_a_reason() -> None:
    shapes = {"x": {1: Dim("length", min=32, max=4096)}}
    program = export(TwoLayers(), torch.randn(1, 256, 64), options=EXACT, dynamic_shapes=shapes)
    assert [site.reason for site in export_report(program).sites] == [SkipReason.TOO_SHORT] * 2
    assert "layers.0" in str(export_report(program))


def test_a_call_that_must_stay_dense_is_an_error_on_demand() -> None:
    class Bidirectional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    x = torch.randn(1, 2, 128, 16)
    assert export_report(export(Bidirectional(), x, options=EXACT)).sites[0].reason is SkipReason.NOT_CAUSAL
    with pytest.raises(AttentionSkippedError, match="not causal"):
        export(Bidirectional(), x, options=EXACT | {"on_skip": "raise"})


def test_settings_by_layer_hold() -> None:
    program = export(TwoLayers(), torch.randn(1, 256, 64), options=EXACT | {"dense_layers": [1]})
    assert [site.reason for site in export_report(program).sites] == [None, SkipReason.DENSE_LAYER]


def test_a_compiled_model_exports_as_itself() -> None:
    model = TwoLayers().eval()
    model.compile(backend="flexprefill", options=EXACT)
    x = torch.randn(1, 256, 64)
    with torch.no_grad():
        assert export_report(export(model, x, options=EXACT)).num_rewritten == 2


def test_under_autograd_a_program_says_what_to_do() -> None:
    program = export(TwoLayers(), torch.randn(1, 256, 64), options=EXACT)
    with pytest.raises(RuntimeError, match=r"call it under torch\.no_grad"):
        program.module()(torch.randn(1, 256, 64))


def test_mistakes_are_one_clear_error() -> None:
    x = torch.randn(1, 256, 64)
    with pytest.raises(UsageError, match=r"must be an nn\.Module"):
        export(F.relu, x)  # type: ignore[arg-type]
    with pytest.raises(InvalidOptionError, match="gama"):
        export(TwoLayers(), x, options={"gama": 1})
    with pytest.raises(InvalidOptionError, match=r'"flash" can\'t be exported'):
        export(TwoLayers(), x, options={"kernel_backend": "flash"})
    with pytest.raises(InvalidOptionError, match="max_density"):
        export(TwoLayers(), x, options={"max_density": 0.5})
    with pytest.raises(UsageError, match="no report"):
        export_report(torch.export.export(nn.Identity(), (x,)))


def test_the_program_that_the_docs_export_runs_sparse(
    model: Logits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    document = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    example = re.findall(r"```python\n(.*?)```", document, re.DOTALL)[0]
    input_ids, is_token = create_prompts(4224)
    names: dict[str, Any] = {"model": model, "input_ids": input_ids, "is_token": is_token}
    exec(compile(example, "docs/export.md", "exec"), names)
    assert export_report(names["program"]).num_rewritten == 1
    assert (tmp_path / "prefill.pt2").exists()


def test_prefill_and_decode_are_two_programs_of_one_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    from package_prefill_and_decode import export_both, generate, package  # noqa: PLC0415

    model = create_tiny_llama(num_layers=1)
    tokens = create_prompts(200)[0][:1]
    programs = export_both(model, EXACT, longest=512)
    assert export_report(programs["prefill"]).num_rewritten == 1
    with fresh_cache():
        package(programs, tmp_path / "model.pt2", **QUICK)
        generated = generate(tmp_path / "model.pt2", tokens, num_tokens=4)
    with torch.no_grad():
        for _ in range(4):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, tokens[:, -4:])
