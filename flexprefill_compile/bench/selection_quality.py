"""What a selection loses: the attention left out, on sampled rows, the error of the output, and wrong blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from flexprefill_compile.block_masks.layout import BlockTables, unpack_blocks
from flexprefill_compile.block_masks.prefill import select_prefill_blocks

from ..settings.config import SparsePrefillConfig

_SAMPLED_ROWS = 64
_SAMPLED_HEADS = 8


def measure_recall(query: Tensor, key: Tensor, tables: BlockTables, scale: float, block_size: int) -> dict[str, float]:
    """Measure the attention mass that a selection keeps, exactly, on sampled rows of sampled heads.

    Args:
        query: (1, H, S, D).
        key: (1, Hkv, S, D).
        tables: The selection, causal: the diagonal partial, the blocks below it full.
        scale: Factor on the scores.
        block_size: Tokens a block.
    """
    device, (heads, length) = query.device, query.shape[1:3]
    num_blocks = tables.kv_num_blocks.shape[-1]
    picked = torch.linspace(0, heads - 1, min(heads, _SAMPLED_HEADS), device=device).long()
    rows = torch.randint(0, length, (_SAMPLED_ROWS,), generator=torch.Generator().manual_seed(0)).to(device)
    scores = query[0, picked[:, None], rows].float() @ key[0, picked * key.shape[1] // heads].float().mT
    is_future = torch.arange(length, device=device) > rows[:, None]
    weights = (scores * scale).masked_fill_(is_future, -torch.inf).softmax(-1)
    padded = torch.nn.functional.pad(weights, (0, -length % block_size))
    by_block = padded.unflatten(-1, (num_blocks, -1)).sum(-1)

    row_blocks = rows // block_size
    columns = tables.full_kv_indices[0, picked[:, None], row_blocks]
    counts = tables.full_kv_num_blocks[0, picked[:, None], row_blocks]
    is_used = torch.arange(columns.shape[-1], device=device) < counts.unsqueeze(-1)
    kept = by_block.gather(-1, columns.where(is_used, 0).long()).where(is_used, 0).sum(-1)
    kept += by_block.gather(-1, row_blocks.expand(len(picked), -1).unsqueeze(-1)).squeeze(-1)
    return {"mean": kept.mean().item(), "p10": kept.flatten().quantile(0.1).item(), "worst": kept.min().item()}


def measure_disagreement(
    query: Tensor, key: Tensor, value: Tensor, tables: BlockTables, config: SparsePrefillConfig
) -> float | None:
    """Return on how many blocks the kernels' selection and plain PyTorch's differ, as a share of the latter's.

    None where plain PyTorch's doesn't fit into memory.

    Args:
        query: (1, H, S, D).
        key: (1, Hkv, S, D).
        value: (1, Hkv, S, Dv).
        tables: What the kernels selected.
        config: By which they did.
    """
    try:
        expected = select_prefill_blocks(query, key, value, query.shape[-1] ** -0.5, config)
        selected = unpack_blocks(tables.full_kv_num_blocks, tables.full_kv_indices, expected.shape[-1])
        selected |= unpack_blocks(tables.kv_num_blocks, tables.kv_indices, expected.shape[-1])
        return (selected != expected).sum().item() / expected.sum().item()
    except torch.OutOfMemoryError:
        return None


def measure_error(output: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference over the norm of ``exact``, a head at a time: (B, H, S, Dv)."""
    pairs = list(zip(output.unbind(1), exact.unbind(1), strict=True))
    difference = sum((a.float() - b.float()).square().sum() for a, b in pairs)
    total = sum(b.float().square().sum() for _, b in pairs)
    return float((torch.as_tensor(difference) / total).sqrt())
