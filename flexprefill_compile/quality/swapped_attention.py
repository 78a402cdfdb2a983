"""Run an uncompiled model with its causal attention calls replaced: a new setting needs no new compile.

    scaled_dot_product_attention(q, k, v, is_causal=True)   ->   attend(number of the layer, q, k, v, scale)

``attend_selected`` is the attention to swap in: FlexAttention over tables of blocks, which are inputs of one compiled
function, so that one compile serves every layer and every setting of a model and a prompt length.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.overrides import TorchFunctionMode

from flexprefill_compile.block_masks.layout import BlockTables
from flexprefill_compile.block_masks.prefill import create_block_mask
from flexprefill_compile.passes.layer_config import number_layer
from flexprefill_compile.passes.rewrite.cpu_workarounds import repaired_cpu_template

from ..torch_internals import compile_with_inductor

# Takes the number of the layer, query, key, value and the scale; None leaves the call as it is.
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor | None]


class _SwappedAttention(TorchFunctionMode):
    """Gives each call of ``scaled_dot_product_attention`` that is a plain causal prefill to ``attend``."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.module_name = ""
        self.heads: dict[int, int] = {}

    def enter_module(self, name: str, module: nn.Module, inputs: Any) -> None:
        """Note which module runs: a forward pre-hook."""
        self.module_name = name

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        layer = number_layer(self.module_name)
        if layer is None:  # no policy could name it
            return func(*args, **kwargs)
        self.heads[layer] = (args[0] if args else kwargs["query"]).shape[1]
        output = _attend_if_plain(functools.partial(self.attend, layer), *args, **kwargs)
        return func(*args, **kwargs) if output is None else output


def _attend_if_plain(
    attend: Callable[[Tensor, Tensor, Tensor, float], Tensor | None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    if not is_causal or attn_mask is not None or dropout_p or query.dim() != 4 or query.shape[2] != key.shape[2]:
        return None
    return attend(query, key, value, 1 / math.sqrt(query.shape[-1]) if scale is None else scale)


@contextlib.contextmanager
def swapped_attention(model: nn.Module, attend: Attend) -> Iterator[dict[int, int]]:
    """While active, every plain causal attention call of a model goes to ``attend`` with the number of its layer.

    Layers have the numbers that a policy gives them. Calls with a mask or of one query stay as they are. What the
    context gives is filled meanwhile: the number of query heads of each layer that attends, in whatever way.
    """
    mode = _SwappedAttention(attend)
    # The last module entered before the call is the attention or one of its projections: both are named by the layer.
    hooks = [
        module.register_forward_pre_hook(functools.partial(mode.enter_module, name))
        for name, module in model.named_modules()
    ]
    try:
        with mode:
            yield mode.heads
    finally:
        for hook in hooks:
            hook.remove()


def attend_selected(
    query: Tensor, key: Tensor, value: Tensor, tables: BlockTables, scale: float, block_size: int
) -> Tensor:
    """Attend causally within the selected blocks.

    Args:
        query: (B, H, S, D), any strides.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        tables: Of (B, H, num_blocks) rows, indices as wide as the grid.
        scale: Factor on the scores.
        block_size: Tokens to a side of a block.

    Returns:
        (B, H, S, Dv).
    """
    compiled = _compile_attention(query.device.type, query.dtype, query.shape[1:], key.shape[1], block_size)
    # Copies: the CPU template doesn't take views of a Linear's output, see passes/rewrite/cpu_workarounds.py.
    output: Tensor = compiled(query.contiguous(), key.contiguous(), value.contiguous(), *tables, scale)
    return output


@functools.cache
def _compile_attention(
    device_type: str, dtype: torch.dtype, query_shape: torch.Size, kv_heads: int, block_size: int
) -> Callable[..., Tensor]:
    """Compile FlexAttention for one shape; a new function each, so that shapes don't count as recompiles of one."""
    options = _choose_kernel_options(device_type, dtype, query_shape[-1], block_size)

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_num_blocks: Tensor,
        kv_indices: Tensor,
        full_kv_num_blocks: Tensor,
        full_kv_indices: Tensor,
        scale: float,
    ) -> Tensor:
        tables = BlockTables(kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices)
        mask = create_block_mask(tables, query.shape[-2], key.shape[-2], block_size)
        shares_heads = query.shape[1] != key.shape[1]
        output = flex_attention(
            query, key, value, block_mask=mask, scale=scale, enable_gqa=shares_heads, kernel_options=options
        )
        return output[0] if isinstance(output, tuple) else output

    return torch.compile(attend, backend=_compile_repaired, dynamic=False)


def _compile_repaired(graph_module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    with repaired_cpu_template():
        return compile_with_inductor(graph_module, example_inputs, {})


def _choose_kernel_options(device_type: str, dtype: torch.dtype, head_dim: int, block_size: int) -> Any:
    """Return small tiles, which fit every GPU's shared memory in every dtype; speed does not matter here."""
    options: dict[str, Any] = {"FORCE_USE_FLEX_ATTENTION": True}
    tile = min(block_size, 128)
    if device_type == "cuda":
        tile = min(block_size, 64 if head_dim * dtype.itemsize <= 512 else 32)
        return options | {"BLOCK_M": tile, "BLOCK_N": tile, "num_warps": 4, "num_stages": 1}
    return options | ({"BLOCK_M": tile, "BLOCK_N": tile} if tile < 128 else {})
