"""Pooled keys: a query in 8, over the means of 32 keys.

    softmax(scale * q . mean(k)) -> sum by key block, mean over the queries of a block

That is S / 8 times S / 32 scores a head: next to nothing beside attention itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention_inputs import SCORES_AT_ONCE
from ..kernels.pooled import POOL_TOKENS, QUERY_STRIDE
from ..layout import pool_blocks, pool_counted_blocks
from .block_shares import Columns, Rows, compute_block_shares
from .inputs import EstimatorInputs


def score_pooled(inputs: EstimatorInputs) -> Tensor:
    """Return the mean attention of a few queries of each block on means of keys, by key block.

    Memory peaks at the means and at a few tensors of ``SCORES_AT_ONCE`` numbers, or of the scores of one query block.

    Returns:
        (B, H, num_q_blocks, num_k_blocks). Rows sum to 1 over the grid's blocks, to 0 where no query counts.
    """
    rows = sample_queries(inputs, QUERY_STRIDE)
    return compute_block_shares(inputs, rows, pool_keys(inputs, POOL_TOKENS), inputs.scale)


def sample_queries(inputs: EstimatorInputs, stride: int) -> Rows:
    """Return the middle one of those that count of each ``stride`` queries.

    Args:
        inputs: Of the attention call.
        stride: Tokens a group, a divisor of the block size.
    """
    counts = inputs.query_counts.unflatten(-1, (-1, stride))
    number = counts.sum(-1)
    is_middle = (counts.cumsum(-1) == (number // 2 + 1).unsqueeze(-1)) & counts
    start = torch.arange(number[0].numel(), device=number.device).view(number.shape[1:]) * stride
    positions = start + is_middle.int().argmax(-1)
    index = positions.flatten(1).clamp(max=inputs.query.shape[2] - 1)
    per_block = number.shape[-1]

    def take(first: int, last: int) -> Tensor:
        chosen = index[:, first * per_block : last * per_block, None].unsqueeze(1)
        rows = inputs.query.gather(2, chosen.expand(*inputs.query.shape[:2], -1, inputs.query.shape[3]))
        return rows.view(*rows.shape[:2], -1, per_block, rows.shape[3])

    return Rows(take, number, positions)


def pool_keys(inputs: EstimatorInputs, tokens: int) -> Columns:
    """Return the means of up to ``tokens`` keys that count, as many to each block of the grid."""
    tokens = min(tokens, inputs.block_size)
    counts = inputs.key_counts.unflatten(-1, (-1, tokens))
    if inputs.facts is None:
        means = pool_blocks(inputs.key, tokens, inputs.dtype)
    else:
        at_once = SCORES_AT_ONCE[inputs.key.device.type]
        pools = counts.flatten(1, 2)[:, : -(-inputs.key.shape[2] // tokens)]
        means = pool_counted_blocks(inputs.key, pools, inputs.dtype, at_once)
    missing = counts.shape[1] * counts.shape[2] - means.shape[2]
    means = torch.nn.functional.pad(means, (0, 0, 0, missing)).to(inputs.product_dtype)
    return Columns(means, counts)
