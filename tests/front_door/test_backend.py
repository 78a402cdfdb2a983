"""The backend as users meet it: by name, in generate(), across lengths, through caches and failures."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from helpers.models import OPTIONS, SelfAttention, TwoLayers, causal_attention, relative_error
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.nn.attention import SDPBackend, sdpa_kernel

import flexprefill_compile.backend as backend_module
from flexprefill_compile import AttentionSkippedError, InvalidOptionError, SkipReason
from flexprefill_compile.backend import FlexPrefillBackend, flexprefill
from flexprefill_compile.block_masks import record_densities
from flexprefill_compile.torch_internals import flex_attention_hop

EXACT = OPTIONS | {"gamma": 1.0}


def run(model: Any, *inputs: Any, **options: Any) -> tuple[Any, FlexPrefillBackend]:
    backend = FlexPrefillBackend()
    with torch.no_grad():
        return torch.compile(model, backend=backend, options=OPTIONS | options)(*inputs), backend


def test_the_name_works_in_a_process_that_never_imported_the_package() -> None:
    program = """
import sys, torch
assert "flexprefill_compile" not in sys.modules
attend = torch.nn.functional.scaled_dot_product_attention
f = torch.compile(lambda x: attend(x, x, x, is_causal=True), backend="flexprefill", options={"min_length": 64})
x = torch.randn(1, 2, 200, 16)
print((f(x) - attend(x, x, x, is_causal=True)).abs().max().item() < 1e-4)
print(sys.modules["flexprefill_compile.backend"].flexprefill.report.num_rewritten)
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.stdout.split() == ["True", "1"], finished.stderr


def test_a_model_runs_sparse_and_says_where() -> None:
    model, x = TwoLayers().eval(), torch.randn(2, 333, 64)
    with record_densities() as densities:
        actual, backend = run(model, x, gamma=0.5)
    assert [site.name for site in backend.report.sites] == ["layers.0", "layers.1"]
    assert backend.report.num_rewritten == 2
    assert [density.shape for density in densities] == [(2, 4), (2, 4)]
    assert all(0 < density.mean() < 1 for density in densities)
    with torch.no_grad():
        assert relative_error(actual, model(x).double()) < 0.2


def test_five_lengths_make_two_graphs() -> None:
    model = SelfAttention().eval()
    backend = FlexPrefillBackend()
    compiled = torch.compile(model, backend=backend, dynamic=True, options=EXACT | {"min_length": 150})
    with torch.no_grad():
        for length in (100, 333, 149, 150, 777):
            x = torch.randn(3, length, 64)
            assert relative_error(compiled(x), model(x).double()) < 1e-6
    outcomes = [site.reason for site in backend.report.sites]
    assert outcomes == [SkipReason.TOO_SHORT, None]


def test_a_short_prompt_is_dense_to_the_bit() -> None:
    x = torch.randn(2, 4, 100, 16)
    actual, _ = run(causal_attention, x, x, x, min_length=4096)
    with torch.no_grad():
        assert torch.equal(actual, torch.compile(causal_attention)(x, x, x))


def test_the_caches_hit_the_second_time_and_tell_configurations_apart() -> None:
    x = torch.randn(1, 4, 333, 16)

    def density_and_hits(**options: Any) -> tuple[float, int, int]:
        torch.compiler.reset()
        counters.clear()
        with record_densities() as densities:
            run(causal_attention, x, x, x, **options)
        hits = counters["aot_autograd"]["autograd_cache_hit"], counters["inductor"]["fxgraph_cache_hit"]
        return densities[0].mean().item(), *hits

    with fresh_cache():
        first, *cold = density_and_hits(gamma=0.9)
        again, *warm = density_and_hits(gamma=0.9)
        lower, *other = density_and_hits(gamma=0.5)
    assert (cold, warm, other) == ([0, 0], [1, 1], [0, 0])
    assert again == first
    assert lower < first


def test_dense_graphs_are_cached_apart_from_inductors_own() -> None:
    with fresh_cache():
        x = torch.randn(1, 4, 100, 16)
        with torch.no_grad():
            torch.compile(causal_attention)(x, x, x)
        torch.compiler.reset()
        run(causal_attention, x, x, x, min_length=4096)
        assert counters["inductor"]["fxgraph_cache_hit"] == 0


def test_a_site_that_fails_to_lower_stays_dense_and_the_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    lowerings = torch._inductor.lowering.lowerings
    lower = lowerings[flex_attention_hop]

    def fail_for_32(query: Any, *args: Any, **kwargs: Any) -> Any:
        if query.get_size()[-1] == 32:
            raise NotImplementedError("no kernel for 32")
        return lower(query, *args, **kwargs)

    monkeypatch.setitem(lowerings, flex_attention_hop, fail_for_32)
    model, x = TwoLayers(head_dims=(16, 32)).eval(), torch.randn(2, 333, 64)
    with fresh_cache():
        actual, backend = run(model, x, gamma=1.0)
    assert [site.reason for site in backend.report.sites] == [None, SkipReason.LOWERING_FAILED]
    assert "no kernel for 32" in str(backend.report)
    with torch.no_grad():
        assert relative_error(actual, model(x).double()) < 1e-6
    torch.compiler.reset()
    with fresh_cache(), pytest.raises(AttentionSkippedError, match="no kernel for 32"):
        run(model, x, gamma=1.0, on_skip="raise")


def test_a_failure_that_is_not_ours_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(backend_module, "compile_with_inductor", fail)
    x = torch.randn(1, 2, 100, 16)
    with pytest.raises(BackendCompilerFailed, match="no compiler"):
        run(causal_attention, x, x, x)
    with pytest.raises(BackendCompilerFailed, match="no compiler"):
        run(torch.relu, x)


def test_on_skip_raise_names_the_call_and_the_reason() -> None:
    x = torch.randn(2, 4, 100, 16)
    with pytest.raises(AttentionSkippedError, match=r"on_skip='raise', and .* stays dense: not causal"):
        run(lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x), x, on_skip="raise")
    _, backend = run(causal_attention, x, x, x, on_skip="raise", min_length=4096)
    assert backend.report.sites[0].reason is SkipReason.TOO_SHORT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.5}, r"^gamma must be in \(0, 1\], got 1.5$"),
        ({"gama": 0.9}, r"^'gama' is an option of neither flexprefill nor inductor: did you mean 'gamma'\?$"),
    ],
)
def test_a_bad_option_reaches_the_caller_as_a_value_error(options: dict[str, Any], message: str) -> None:
    compiled = torch.compile(causal_attention, backend="flexprefill", options=options)
    x = torch.randn(1, 2, 100, 16)
    with pytest.raises(ValueError, match=message) as raised:
        compiled(x, x, x)
    assert isinstance(raised.value, InvalidOptionError)


def test_an_unknown_mode_is_refused_with_the_known_ones() -> None:
    compiled = torch.compile(causal_attention, backend="flexprefill", mode="fastest")
    x = torch.randn(1, 2, 100, 16)
    with pytest.raises(InvalidOptionError, match=r"^mode must be one of default, .*, got 'fastest'$"):
        compiled(x, x, x)


def test_mode_and_other_options_go_on_to_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def spy(graph_module: Any, example_inputs: Any, config_patches: dict[str, Any]) -> Any:
        seen.append(config_patches)
        return graph_module.forward

    monkeypatch.setattr(backend_module, "compile_with_inductor", spy)
    x = torch.randn(1, 2, 32, 16)
    torch.compile(causal_attention, backend="flexprefill", mode="max-autotune-no-cudagraphs")(x, x, x)
    torch.compiler.reset()
    torch.compile(causal_attention, backend="flexprefill", options={"gamma": 0.9, "max-autotune": True})(x, x, x)
    assert [patches["max_autotune"] for patches in seen] == [True, True]
    assert "gamma" not in seen[1]


def test_the_report_lasts_until_the_compiler_is_reset() -> None:
    x = torch.randn(1, 2, 100, 16)
    torch.compile(causal_attention, backend="flexprefill")(x, x, x)
    assert len(flexprefill.report.sites) == 1
    torch.compiler.reset()
    assert flexprefill.report.sites == ()


def test_under_autograd_attention_stays_dense_and_trains() -> None:
    model, x = SelfAttention(), torch.randn(2, 100, 64)
    backend = FlexPrefillBackend()
    torch.compile(model, backend=backend, options=OPTIONS)(x).sum().backward()
    assert backend.report.sites[0].reason is SkipReason.GRADIENT
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_regions_of_autocast_sdpa_kernel_and_inference_mode() -> None:
    model, x = SelfAttention().eval(), torch.randn(2, 100, 64)

    def in_regions(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            return model(x)

    backend = FlexPrefillBackend()
    with torch.inference_mode():
        actual = torch.compile(in_regions, backend=backend, options=EXACT)(x)
        expected = in_regions(x)
    assert backend.report.num_rewritten == 1
    assert actual.dtype == expected.dtype
    assert relative_error(actual, expected.double()) < 2**-7


def test_attention_inputs_of_another_dtype_are_cast_as_autocast_does() -> None:
    def in_autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return causal_attention(x, x, x)

    x = torch.randn(2, 4, 100, 16)
    actual, backend = run(in_autocast, x, gamma=1.0)
    assert backend.report.num_rewritten == 1
    assert actual.dtype == torch.bfloat16
    assert relative_error(actual, in_autocast(x).double()) < 2**-7


def test_checkpointed_code_runs_sparse() -> None:
    model, x = SelfAttention().eval(), torch.randn(2, 100, 64)

    def checkpointed(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    actual, backend = run(checkpointed, x, gamma=1.0)
    assert backend.report.num_rewritten == 1
    with torch.no_grad():
        assert relative_error(actual, model(x).double()) < 1e-6


def test_a_forward_under_autograd_warns_once_and_one_without_does_not() -> None:
    model = torch.compile(TwoLayers().eval(), backend=FlexPrefillBackend(), dynamic=False, options=OPTIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        with torch.no_grad():
            model(torch.randn(1, 100, 64))
        assert not [warning for warning in caught if "autograd" in str(warning.message)]
        for length in (100, 110, 120):
            model(torch.randn(1, length, 64))
    (message,) = [str(warning.message) for warning in caught if "autograd" in str(warning.message)]
    assert message == "attention stays dense under autograd: call the model under torch.no_grad()"
