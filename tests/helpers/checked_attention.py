"""A stand-in for inductor: run the rewritten graph as it is, each FlexAttention call as a checked dense reference.

Uncompiled, FlexAttention's op ignores the block tables. The reference here computes what they say, and nothing else.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.fx import GraphModule

import flexprefill_compile.backend as backend_module
from flexprefill_compile.passes.base import graph_modules
from flexprefill_compile.torch_internals import attention_strides, flex_attention_hop


class TableError(AssertionError):
    """Block tables that don't say the same as their mask_mod; not an error of the model."""


@contextlib.contextmanager
def without_code_generation(*, is_dense: bool = True, attend: Callable[..., Any] | None = None) -> Iterator[None]:
    """While active, FlexPrefillBackend runs its rewritten graphs eagerly and checks their tables.

    Args:
        is_dense: Whether the tables must hold every pair that the mask allows, as for gamma = 1.
        attend: What to run in place of FlexAttention's op; None is one of the functions below.
    """
    attend = attend or (attend_checked if is_dense else attend_sparsely)

    def run_checked(
        graph_module: GraphModule, example_inputs: Sequence[Any], config_patches: dict[str, Any]
    ) -> Callable[..., Any]:
        for module in graph_modules(graph_module):
            for node in module.graph.find_nodes(op="call_function", target=flex_attention_hop):
                if node.users:
                    node.target = attend
                else:  # the model's own call that was rewritten; inductor drops it too
                    module.graph.erase_node(node)
            module.recompile()
        return graph_module.forward

    with mock.patch.object(backend_module, "compile_with_inductor", run_checked):
        yield


def attend_sparsely(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Attend as ``attend_checked`` does, over tables that may leave blocks out."""
    return attend_checked(*arguments, is_dense=False)


def attend_checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor],
    block_mask: tuple[Any, ...],
    scale: float,
    kernel_options: dict[str, Any],
    score_mod_captures: Sequence[Any] = (),
    mask_mod_captures: Sequence[Any] = (),
    *,
    is_dense: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend as FlexAttention's op does, over the blocks of the tables alone.

    Returns:
        The output (B, H, S, Dv), zero in rows without keys, the logsumexp and the maximum of the scores, to the base
        2, (B, H, S).

    Raises:
        TableError: The tables leave out a pair that the mask_mod allows, or a full block has one that it forbids.
    """
    allowed = find_allowed(query, key, block_mask, mask_mod_captures)
    computed = check_tables(allowed, block_mask, is_dense=is_dense)

    indices = _index_pairs(query, key)
    group = query.shape[1] // key.shape[1]
    key, value = (x.float().repeat_interleave(group, dim=1) for x in (key, value))
    scores = query.float() @ key.mT * scale
    scores = score_mod(scores, *indices, *score_mod_captures).masked_fill(~computed, -torch.inf)
    weights = scores.softmax(-1).masked_fill(~computed, 0)  # a row without keys is zero, not NaN
    output = (weights.float() @ value).to(query.dtype)
    return _lay_out(output, query), scores.logsumexp(-1) / math.log(2), scores.amax(-1) / math.log(2)


def find_allowed(query: Tensor, key: Tensor, block_mask: tuple[Any, ...], captures: Sequence[Any] = ()) -> Tensor:
    """Return the pairs that the mask_mod of a BlockMask's tuple allows, (B, H, Q, K) bool."""
    shape = *query.shape[:3], key.shape[-2]
    return block_mask[-1](*_index_pairs(query, key), *captures).expand(shape)


def _index_pairs(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return batch, head, query and key of every pair, which broadcast to (B, H, Q, K)."""
    batch, heads, query_length, _ = query.shape
    return (
        torch.arange(batch).view(-1, 1, 1, 1),
        torch.arange(heads).view(-1, 1, 1),
        torch.arange(query_length).view(-1, 1),
        torch.arange(key.shape[-2]),
    )


def _lay_out(output: Tensor, query: Tensor) -> Tensor:
    """Give an output the strides that FlexAttention's op gives it."""
    return torch.empty_strided(output.shape, attention_strides(output, query), dtype=output.dtype).copy_(output)


def check_tables(allowed: Tensor, block_mask: tuple[Any, ...], *, is_dense: bool = True) -> Tensor:
    """Check the tables of a BlockMask's tuple against its mask, by element.

    Args:
        allowed: (B, H, Q, K) bool, the mask.
        block_mask: As ``BlockMask.as_tuple()`` gives it.
        is_dense: Whether they must hold every pair that the mask allows.

    Returns:
        (B, H, Q, K) bool, the pairs that the tables compute.

    Raises:
        TableError: The tables and the mask disagree, or the tables are no valid ones.
    """
    lengths, (partial_counts, partial_columns, full_counts, full_columns) = block_mask[:2], block_mask[2:6]
    sizes = block_mask[-3], block_mask[-2]
    if tuple(lengths) != tuple(allowed.shape[-2:]):
        raise TableError(f"the tables are for {tuple(lengths)} tokens, attention has {tuple(allowed.shape[-2:])}")
    partial = unpack_tokens(partial_counts, partial_columns, sizes, allowed)
    full = unpack_tokens(full_counts, full_columns, sizes, allowed)
    if (partial & full).any():
        raise TableError("a block is listed both as partial and as full")
    if (full & ~allowed).any():
        raise TableError(f"full blocks hold pairs that the mask forbids, the first at {_first(full & ~allowed)}")
    computed = full | (partial & allowed)
    if is_dense and (allowed & ~computed).any():
        raise TableError(f"pairs that the mask allows are in no block, the first at {_first(allowed & ~computed)}")
    return computed


def unpack_tokens(counts: Tensor, columns: Tensor, sizes: tuple[int, int], like: Tensor) -> Tensor:
    """Unpack one pair of tables to (B, H, Q, K) bool over tokens.

    Raises:
        TableError: A row lists a block twice, or one that doesn't exist.
    """
    num_blocks = -(-like.shape[-1] // sizes[1])
    listed = torch.arange(columns.shape[-1]) < counts.unsqueeze(-1)
    valid = columns.masked_fill(~listed, 0)
    if (valid < 0).any() or (valid >= num_blocks).any():
        raise TableError(f"a table lists a block out of range of {num_blocks}")
    times = torch.zeros(*columns.shape[:-1], num_blocks, dtype=torch.int32)
    times.scatter_add_(-1, valid.long(), listed.int())
    if (times > 1).any():
        raise TableError("a table lists a block twice")
    tokens = times.bool().repeat_interleave(sizes[0], dim=-2).repeat_interleave(sizes[1], dim=-1)
    return tokens[..., : like.shape[-2], : like.shape[-1]].expand_as(like)


def _first(pairs: Tensor) -> str:
    """Say where the first of some pairs is."""
    return "batch {}, head {}, query {}, key {}".format(*pairs.nonzero()[0].tolist())
