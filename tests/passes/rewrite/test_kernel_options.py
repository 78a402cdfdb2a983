"""Which of FlexAttention's kernels runs, and with which options; the GPU is made up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import OPTIONS, causal_attention
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flexprefill_compile import AttentionSkippedError, SkipReason
from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.passes.rewrite import kernel_options
from flexprefill_compile.passes.rewrite.kernel_options import choose_kernel_options, refuse_flash
from flexprefill_compile.settings.config import SparsePrefillConfig


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hopper GPU with flash-attn-4, as far as the choice goes."""
    monkeypatch.setattr(kernel_options, "is_flash_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))


def tensors(
    head_dim: int = 128,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    length: int = 16384,
) -> list[Tensor]:
    with FakeTensorMode():
        return [
            torch.empty(1, 2, length, dim, dtype=dtype, device=device)
            for dim in (head_dim, head_dim, value_dim or head_dim)
        ]


def test_flash_runs_where_it_fits() -> None:
    for head_dim in (64, 128):
        options = choose_kernel_options(SparsePrefillConfig(), *tensors(head_dim), is_plain=True)
        assert options == {"BACKEND": "FLASH"}


@pytest.mark.parametrize(
    ("tensor_options", "options", "reason"),
    [
        ({"head_dim": 80}, {}, "head dimensions [80], not one of [64, 128]"),
        ({"value_dim": 64}, {}, "head dimensions [64, 128], not one of [64, 128]"),
        ({"dtype": torch.float32}, {}, "dtype torch.float32"),
        ({"device": "cpu"}, {}, "device cpu"),
        ({"length": 8192}, {}, "fewer than 16384 keys, for which Triton's calls take less of the host"),
        ({}, {"block_size": 64}, "block_size 64, not 128"),
        ({}, {"max_budget": 2048}, "max_budget, which narrows the tables"),
        ({}, {"kernel_backend": "triton"}, "kernel_backend is triton"),
        ({}, {"kernel_options": {"num_warps": 4}}, "kernel_options are given, which are the Triton template's"),
    ],
)
def test_elsewhere_triton_does(tensor_options: dict[str, Any], options: dict[str, Any], reason: str) -> None:
    config = SparsePrefillConfig(**options)
    assert refuse_flash(config, *tensors(**tensor_options), is_plain=True) == reason
    assert "BACKEND" not in choose_kernel_options(config, *tensors(**tensor_options), is_plain=True)


def test_short_prompts_run_by_flash_if_asked() -> None:
    config = SparsePrefillConfig(kernel_backend="flash")
    assert choose_kernel_options(config, *tensors(length=8192), is_plain=True) == {"BACKEND": "FLASH"}


def test_a_mask_keeps_triton() -> None:
    refusal = refuse_flash(SparsePrefillConfig(), *tensors(), is_plain=False)
    assert refusal == "a mask or bias other than causal, or sinks"


def test_blackwell_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (10, 0))
    assert refuse_flash(SparsePrefillConfig(), *tensors(), is_plain=True) == "a GPU of compute capability 10"
    assert refuse_flash(SparsePrefillConfig(kernel_backend="flash"), *tensors(), is_plain=True) is None


def test_what_is_not_installed_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_options, "is_flash_available", lambda: False)
    reason = refuse_flash(SparsePrefillConfig(kernel_backend="flash"), *tensors(), is_plain=True)
    assert reason == "flash-attn-4 is not installed: pip install 'flexprefill-compile[flash]'"


@pytest.mark.parametrize(
    ("head_dim", "dtype", "block_size", "expected"),
    [
        (64, torch.bfloat16, 128, (128, 128, 4, 3)),
        (64, torch.bfloat16, 64, (64, 64, 4, 3)),
        (128, torch.float16, 256, (128, 128, 8, 3)),
        (128, torch.bfloat16, 64, (64, 64, 4, 3)),
        (256, torch.bfloat16, 128, (128, 64, 8, 2)),
        (192, torch.bfloat16, 128, (None, None, None, None)),
        (256, torch.bfloat16, 64, (64, 64, None, None)),
        (128, torch.float32, 128, (None, None, None, None)),
        (512, torch.bfloat16, 128, (None, None, None, None)),
        (128, torch.bfloat16, 32, (32, 32, None, None)),
    ],
)
def test_tiles_are_those_that_were_measured(
    head_dim: int, dtype: torch.dtype, block_size: int, expected: tuple[int | None, ...]
) -> None:
    config = SparsePrefillConfig(kernel_backend="triton", block_size=block_size)
    options = choose_kernel_options(config, *tensors(head_dim, dtype=dtype), is_plain=True)
    assert tuple(map(options.get, ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"))) == expected
    assert options.get("USE_TMA", False) == (expected[3] == 3)


def test_the_users_options_win() -> None:
    config = SparsePrefillConfig(kernel_backend="flash", kernel_options={"BACKEND": "TRITON"})
    assert choose_kernel_options(config, *tensors(), is_plain=True) == {"BACKEND": "TRITON"}
    options = choose_kernel_options(SparsePrefillConfig(kernel_options={"num_warps": 2}), *tensors(), is_plain=True)
    assert options["num_warps"] == 2
    assert options["FORCE_USE_FLEX_ATTENTION"]


def test_flash_asked_for_in_vain_leaves_the_call_dense() -> None:
    inputs = [torch.randn(1, heads, 200, 16) for heads in (4, 2, 2)]
    backend = FlexPrefillBackend()
    with torch.no_grad():
        compiled = torch.compile(causal_attention, backend=backend, options=OPTIONS | {"kernel_backend": "flash"})
        assert torch.equal(compiled(*inputs), causal_attention(*inputs))
        assert [(site.reason, site.detail) for site in backend.report.sites] == [(SkipReason.KERNEL, "device cpu")]
        options = OPTIONS | {"kernel_backend": "flash", "on_skip": "raise"}
        with pytest.raises(AttentionSkippedError, match=r"flash, which doesn\'t fit \(device cpu\)"):
            torch.compile(causal_attention, backend=FlexPrefillBackend(), options=options)(*inputs)
