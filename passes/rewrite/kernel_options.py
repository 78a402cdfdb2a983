"""FlexAttention's options for a device: which of its kernels, and in which tiles. Chosen from measurements."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from flexprefill_compile.settings.config import SparsePrefillConfig
from flexprefill_compile.settings.device_defaults import is_flash_available
from flexprefill_compile.torch_internals import statically_known_true

# Hopper's tiles and TMA were chosen on an H100 with torch 2.11: bfloat16, 32768 tokens, 24 % of the blocks, TFLOP/s:
#   head dimension   blocks of   here   otherwise
#               64         128    380   325 with 8 warps, 305 with 8 and without TMA
#              128         128    482   448 without TMA; inductor's own choice on an H200, where these reach 452: 387
#              256         128    492   315 by inductor's own choice; 566 with TMA, whose output wasn't checked there
#           64, 128          64    374, 464   367, 466 without TMA
# At 256 wide, blocks of 64 gain nothing over inductor's choice. PRESCALE_QK gains less than the spread, and rounds.

# Above it, tiles of several pipeline stages outgrow the shared memory of a GPU.
_LARGEST_PIPELINED_ROW_BYTES = 512
_HOPPER, _BLACKWELL = 9, 10
# What flash-attn-4's kernels were seen to take: bfloat16, 128 wide, on Hopper. Its own lists say the rest.
_FLASH_CAPABILITIES = {"auto": (_HOPPER,), "flash": (_HOPPER, _BLACKWELL)}
_FLASH_HEAD_DIMS = (64, 128)
_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_FLASH_BLOCK_SIZE = 128
# Its calls take about 0.1 ms more of the host than Triton's. In a model's layer of 12 heads on an H100, as called,
# Triton was faster at 8192 tokens (0.23 ms for 0.33), flash-attn-4 at 16384 (0.39 for 0.50).
_FLASH_FROM_KEYS = 16384
_NOT_INSTALLED = "flash-attn-4 is not installed: pip install 'flexprefill-compile[flash]'"


def choose_kernel_options(
    config: SparsePrefillConfig, query: Tensor, key: Tensor, value: Tensor, *, is_plain: bool
) -> dict[str, Any]:
    """Return FlexAttention's kernel options: never its decoding kernel, tiles no larger than a mask block.

    The user's ``kernel_options`` come last and win.

    Args:
        config: Of the selection.
        query: The example of (B, H, Sq, D).
        key: The example of (B, Hkv, Skv, D).
        value: The example of (B, Hkv, Skv, Dv).
        is_plain: Whether the attention is causal and nothing else.
    """
    own = dict(config.kernel_options)
    if refuse_flash(config, query, key, value, is_plain=is_plain) is None:
        return {"BACKEND": "FLASH"} | own
    # The two say the same, and FlexAttention takes no more than one of them.
    options: dict[str, Any] = {} if "BACKEND" in own else {"FORCE_USE_FLEX_ATTENTION": True}
    if key.is_cuda and is_plain:  # every row meets itself on the diagonal, so that none is masked out altogether
        options["ROWS_GUARANTEED_SAFE"] = True
    row_bytes = max(key.shape[-1], value.shape[-1]) * key.element_size()
    tile = min(config.block_size, 128)
    capability = torch.cuda.get_device_capability(key.device)[0] if key.is_cuda else 0
    if capability == _HOPPER and tile >= 64 and row_bytes <= 256:
        options |= {"BLOCK_M": tile, "BLOCK_N": tile, "num_warps": tile // 16, "num_stages": 3, "USE_TMA": True}
        if row_bytes <= 128:
            options["num_warps"] = 4
    elif capability == _HOPPER and tile == 128 and row_bytes == 512 and key.element_size() == 2:
        options |= {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    elif tile < 128:  # inductor's own choice of tiles assumes mask blocks of 128
        options |= {"BLOCK_M": tile, "BLOCK_N": tile}
        if row_bytes > _LARGEST_PIPELINED_ROW_BYTES:
            options["num_stages"] = 1
    return options | own


def refuse_flash(
    config: SparsePrefillConfig, query: Tensor, key: Tensor, value: Tensor, *, is_plain: bool
) -> str | None:
    """Return why flash-attn-4's kernels are not to run an attention, or None if they are. Arguments as above."""
    refusals = _list_refusals(config, query, key, value, is_plain=is_plain)
    return next((reason for reason, holds in refusals.items() if holds), None)


def misses_flash(config: SparsePrefillConfig, query: Tensor, key: Tensor, value: Tensor, *, is_plain: bool) -> bool:
    """Tell whether flash-attn-4's kernels would run an attention, were they installed. Arguments as above."""
    if is_flash_available() or not query.is_cuda:
        return False
    as_if_there = dataclasses.replace(config, block_size=_FLASH_BLOCK_SIZE)
    refusals = _list_refusals(as_if_there, query, key, value, is_plain=is_plain)
    return not any(holds for reason, holds in refusals.items() if reason != _NOT_INSTALLED)


def _list_refusals(
    config: SparsePrefillConfig, query: Tensor, key: Tensor, value: Tensor, *, is_plain: bool
) -> dict[str, bool]:
    """Return each reason not to run flash-attn-4's kernels, and whether it holds."""
    wanted = config.kernel_backend
    head_dims = {int(query.shape[-1]), int(value.shape[-1])}
    capability = torch.cuda.get_device_capability(query.device)[0] if query.is_cuda else 0
    return {
        "kernel_backend is triton": wanted == "triton",
        "kernel_options are given, which are the Triton template's": wanted == "auto" and bool(config.kernel_options),
        f"device {query.device.type}": not query.is_cuda,
        _NOT_INSTALLED: not is_flash_available(),
        f"a GPU of compute capability {capability}": capability not in _FLASH_CAPABILITIES.get(wanted, ()),
        f"fewer than {_FLASH_FROM_KEYS} keys, for which Triton's calls take less of the host": (
            wanted == "auto" and statically_known_true(key.shape[-2] < _FLASH_FROM_KEYS)
        ),
        "a mask or bias other than causal, or sinks": not is_plain,
        f"block_size {config.block_size}, not {_FLASH_BLOCK_SIZE}": config.block_size != _FLASH_BLOCK_SIZE,
        "max_budget, which narrows the tables": config.max_budget is not None,
        f"dtype {query.dtype}": query.dtype not in _FLASH_DTYPES,
        f"head dimensions {sorted(head_dims)}, not one of {list(_FLASH_HEAD_DIMS)}": (
            len(head_dims) > 1 or not head_dims <= set(_FLASH_HEAD_DIMS)
        ),
    }
