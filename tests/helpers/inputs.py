"""Queries and keys for tests: random ones, ones with the structures of real attention, and any attention at all."""

from __future__ import annotations

import collections
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flexprefill_compile.settings.config import SparsePrefillConfig

aten = torch.ops.aten
SYNCING_OPS = {aten._local_scalar_dense, aten.item, aten.nonzero, aten.masked_select, aten._unique2, aten.equal}
STRUCTURES = ("sink", "stripes", "diagonal", "window", "topics")
NUM_TOPICS = 4
CODES = slice(2 + NUM_TOPICS + 4, None)  # the features left for position codes


def random_qk(
    seed: int,
    batch: int,
    heads: int,
    kv_heads: int,
    length: int,
    head_dim: int,
    *,
    spread: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Return a normal query (B, H, S, D) of standard deviation ``spread``, and a normal key (B, Hkv, S, D)."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, length, head_dim, generator=generator, dtype=torch.float64) * spread
    key = torch.randn(batch, kv_heads, length, head_dim, generator=generator, dtype=torch.float64)
    return query.to(dtype), key.to(dtype)


def structured_qk(
    seed: int,
    batch: int,
    heads: int,
    kv_heads: int,
    length: int,
    head_dim: int,
    *,
    block_size: int,
    strength: float = 10.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Return a query (B, H, S, D) and a key (B, Hkv, S, D) whose heads attend as those of language models do.

    Every key carries all the features in a rotated basis; the heads of one sequence take turns at the STRUCTURES,
    starting with number ``seed``, each with a peak score of ``strength`` at scale 1 / sqrt(D). The diagonal's offset
    is no multiple of the block. ``head_dim`` is 16 at least.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    position = torch.arange(length)
    query = 0.1 * normal(batch, heads, length, head_dim)
    key = 0.1 * normal(batch, kv_heads, length, head_dim)
    key[..., 0] += position == 0
    key[..., 1] += torch.rand(batch, kv_heads, length, generator=generator) < 1 / 16
    topic = position // (2 * block_size) % NUM_TOPICS
    topics = torch.nn.functional.one_hot(topic, NUM_TOPICS).double()
    key[..., 2 : 2 + NUM_TOPICS] += topics
    angles = position[:, None] * torch.tensor([math.tau / (6 * block_size), math.tau / length])
    waves = torch.cat([angles.cos(), angles.sin()], dim=-1) / math.sqrt(2)
    key[..., 2 + NUM_TOPICS : CODES.start] += waves
    codes = torch.nn.functional.normalize(normal(batch, kv_heads, length, head_dim - CODES.start), dim=-1)
    key[..., CODES] += codes

    offset = length // 2 // block_size * block_size + block_size // 2 + 1
    for head in range(heads):
        feature = torch.zeros(batch, length, head_dim, dtype=torch.float64)
        match STRUCTURES[(head + seed) % len(STRUCTURES)]:
            case "sink":
                feature[..., 0] = 1
            case "stripes":
                feature[..., 1] = 1
            case "topics":
                feature[..., 2 : 2 + NUM_TOPICS] = topics
            case "window":
                feature[..., 2 + NUM_TOPICS : CODES.start] = waves
            case "diagonal":
                feature[..., CODES] = codes[:, head * kv_heads // heads].roll(offset % length, dims=1)
        query[:, head] += strength * math.sqrt(head_dim) * feature
    rotation = torch.linalg.qr(normal(head_dim, head_dim)).Q
    return (query @ rotation).to(dtype), (key @ rotation).to(dtype)


def qk_of_scores(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return query and key, (1, H, S, S) and (1, 1, S, S), whose scores at scale 1 are the given (H, S, S)."""
    return scores.unsqueeze(0), torch.eye(scores.shape[-1], dtype=scores.dtype).expand(1, 1, -1, -1)


def representative_weights(query: Tensor, key: Tensor, scale: float, block_size: int) -> Tensor:
    """Return the true causal attention of the last ``block_size`` queries, (B, H, R, S) float64."""
    length = query.shape[-2]
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query[:, :, -block_size:].double() @ key.mT * scale
    causal = torch.ones(length, length, dtype=torch.bool).tril()[-block_size:]
    return scores.masked_fill(~causal, -torch.inf).softmax(-1)


def covered_share(weights: Tensor, selected: Tensor, block_size: int) -> Tensor:
    """Return the share of attention ``weights`` (B, H, R, S) of the last queries in ``selected`` blocks: (B, H)."""
    num_rows, length = weights.shape[-2:]
    tokens = selected.repeat_interleave(block_size, dim=-2).repeat_interleave(block_size, dim=-1)
    return (weights * tokens[..., length - num_rows : length, :length]).sum((-2, -1)) / num_rows


class CountOps(TorchDispatchMode):
    """Counts the ops that run and refuses those that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in SYNCING_OPS, f"{func} waits for the device"
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


class RecordSizes(TorchDispatchMode):
    """Records the largest tensor that any op returns, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def paper_config(**settings: Any) -> SparsePrefillConfig:
    """Return settings of the paper's estimator, whatever the default is."""
    return SparsePrefillConfig(**({"estimator": "flexprefill"} | settings))
