"""Which blocks are full, partial or empty under a mask, in O(num_blocks^2) work: the mask over intervals of tokens.

    query_index  0 .. 127        ge     always / never / for some pairs
    key_index    256 .. 383   ───────►  certain    possible

Values that depend on the query alone, or on the key alone, are computed exactly, token by token. An op where the two
meet sees, of each operand, the least and the greatest value in each block, and gives bounds on what its results can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from ..layout import AttentionSizes, count_blocks, realize
from .interval_rules import Interval, apply_rule, is_true

aten = torch.ops.aten
_CONJUNCTIONS = (aten.bitwise_and.Tensor, aten.logical_and.default)
_QUERY_AXIS, _KEY_AXIS = -2, -1


class BlockBounds(NamedTuple):
    """What is proven of each block: (B, H, num_q_blocks, num_k_blocks) bool, B or H 1 where the mask ignores them.

    ``certain``: every pair of tokens is attended. ``possible``: some pair may be; where False, none is.
    """

    certain: Tensor
    possible: Tensor


def classify_blocks(
    mask_mod: GraphModule,
    captures: Sequence[Any],
    sizes: AttentionSizes,
    block_size: int,
    device: torch.device,
) -> BlockBounds:
    """Bound what a mask lets through in each block, without evaluating it on pairs of tokens.

    Exact for causal, window, chunk and padding masks, for document ids whose documents are each in one piece, and for
    their conjunctions; sound for every mask. Only a capture that is itself indexed by query and key is read pair by
    pair, and then the whole mask is exact. Traceable; sizes may be symbolic.

    Args:
        mask_mod: (batch, head, query_index, key_index, *captures) to bool, of elementwise aten ops.
        captures: Tensors of any rank, SymInts or numbers.
        sizes: The sizes of the attention call.
        block_size: Tokens a block of queries and of keys, 2 at least; the last one of each may be ragged.
        device: Where the captures are.
    """
    grid = (count_blocks(sizes.query_length, block_size), count_blocks(sizes.key_length, block_size))
    indices = _create_indices(sizes, grid, block_size, device)
    bounds = _BlockInterpreter(mask_mod).classify(*indices, *captures)
    every_block = torch.ones((1, 1, *grid, 1, 1), dtype=torch.bool, device=device)
    return BlockBounds(*((end & every_block)[..., 0, 0] for end in bounds))


def _create_indices(
    sizes: AttentionSizes, grid: tuple[int, int], block_size: int, device: torch.device
) -> tuple[Tensor, ...]:
    """Return batch, head, query and key indices that broadcast to (B, H, num_q_blocks, num_k_blocks, block, block).

    Ragged blocks repeat their last token, which adds nothing to what they hold.
    """

    def indices(length: int, axis: int) -> Tensor:
        # Indexed rather than viewed: a view of symbolic length adds guards.
        position = torch.arange(length, device=device)
        return position[(*[None] * axis, slice(None), *[None] * (5 - axis))]

    query = indices(grid[0], 2) * block_size + indices(block_size, 4)
    key = indices(grid[1], 3) * block_size + indices(block_size, 5)
    return (
        indices(sizes.batch, 0),
        indices(sizes.heads, 1),
        query.clamp(max=sizes.query_length - 1),
        key.clamp(max=sizes.key_length - 1),
    )


class _BlockInterpreter(Interpreter):
    """Segments what depends on one token index on tokens, and then what depends on both on intervals."""

    def __init__(self, mask_mod: GraphModule) -> None:
        super().__init__(mask_mod, garbage_collect_values=False)
        self.pairwise = _find_pairwise(mask_mod.graph)
        self.valid: dict[int | None, Tensor] = {}  # per axis: the tokens that aren't masked altogether

    def classify(self, *arguments: Any) -> Interval:
        """Return the mask's three-valued result, (B, H, num_q_blocks, num_k_blocks, 1, 1), any of them 1."""
        self.args_iter = iter(arguments)
        *nodes, output = self.graph.nodes
        result = cast("Node", output.args[0])
        for node in nodes:
            if node not in self.pairwise:
                self.env[node] = self.run_node(node)
        self._leave_out_masked_tokens(self._conjuncts(result))
        for node in nodes:
            if node in self.pairwise:
                self.env[node] = self.run_node(node)
        return is_true(self.env[result])

    def run_node(self, node: Node) -> Any:
        """Run a node on tokens, or by the rule of its op."""
        if node not in self.pairwise:
            return super().run_node(node)
        arguments, keywords = self.fetch_args_kwargs_from_env(node)
        result = self._bound(node.target, arguments, keywords)
        if node.target in (aten.eq.Tensor, aten.ne.Tensor) and all(isinstance(x, Tensor) for x in arguments):
            ranked = self._bound(node.target, _rank_values(*arguments), {})
            return Interval(result.lower | ranked.lower, result.upper & ranked.upper)
        return result

    def pool(self, x: Any) -> Any:
        """Return the least and the greatest value in each block, among the valid tokens."""
        if x is None or isinstance(x, Interval):
            return x
        is_grid = isinstance(x, Tensor) and x.dim() == 6
        axes = [axis for axis in (_QUERY_AXIS, _KEY_AXIS) if is_grid and x.shape[axis] != 1]
        if not axes:
            return Interval(x, x)
        least = greatest = x
        for axis in axes:
            if axis in self.valid:
                bottom, top = _limits(x.dtype)
                least = torch.where(self.valid[axis], least, top)
                greatest = torch.where(self.valid[axis], greatest, bottom)
        return Interval(least.amin(axes, keepdim=True), greatest.amax(axes, keepdim=True))

    def _bound(self, op: Any, arguments: Sequence[Any], keywords: dict[str, Any]) -> Interval:
        operands = pytree.tree_map(self.pool, tuple(arguments), is_leaf=lambda x: isinstance(x, Interval))
        return apply_rule(op, operands, keywords)

    def _conjuncts(self, node: Node) -> list[Node]:
        """Return the terms that all have to hold, as far as query and key are apart."""
        if node in self.pairwise and node.target in _CONJUNCTIONS:
            return [term for argument in node.args for term in self._conjuncts(cast("Node", argument))]
        return [node]

    def _leave_out_masked_tokens(self, terms: list[Node]) -> None:
        """Leave out of the other terms' intervals the tokens that one term rules out on its own.

        A padded key, say, can't be the one that causality would let through. Where a block has no token left, the
        intervals mean nothing, but then the term that ruled them out says that the block is empty.
        """
        alone = [term for term in terms if term not in self.pairwise]
        axes = {term: self._mask_axis(self.env[term]) for term in alone}
        valid: dict[int | None, Tensor] = {
            axis: reduce(torch.logical_and, [self.env[term] for term in alone if axes[term] == axis])
            for axis in (_QUERY_AXIS, _KEY_AXIS)
            if axis in axes.values()
        }
        # Of two terms on keys, both may leave tokens in a block, but no token in common: each stands for both.
        self.env.update({term: self.pool(valid.get(axis, self.env[term])) for term, axis in axes.items()})
        self.valid = valid

    @staticmethod
    def _mask_axis(value: Any) -> int | None:
        """Return the axis of tokens along which a boolean masks."""
        if not isinstance(value, Tensor) or value.dtype != torch.bool or value.dim() != 6:
            return None
        return next((axis for axis in (_QUERY_AXIS, _KEY_AXIS) if value.shape[axis] != 1), None)


def _find_pairwise(graph: Graph) -> set[Node]:
    """Return the nodes that depend on query and key; none if a capture is indexed by pairs: then all is read so."""
    _, _, query_index, key_index = graph.find_nodes(op="placeholder")[:4]
    sources: dict[Node, set[Node]] = {}
    for node in graph.nodes:
        sources[node] = {node} & {query_index, key_index}
        sources[node] |= {source for parent in node.all_input_nodes for source in sources[parent]}
    pairwise = {node for node in graph.nodes if len(sources[node]) == 2 and node.op == "call_function"}
    for node in pairwise:
        if node.target is aten.index.Tensor and not pairwise & set(node.all_input_nodes):
            return set()
    return pairwise


def _limits(dtype: torch.dtype) -> tuple[float, float]:
    if dtype == torch.bool:
        return False, True
    if dtype.is_floating_point:
        return -torch.inf, torch.inf
    return torch.iinfo(dtype).min, torch.iinfo(dtype).max


def _rank_values(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Number values by where they occur first, keys before queries; equal values, and only they, are numbered alike.

    Numbers of documents, in any order, become ascending ones: an interval of them holds no document from elsewhere.

    Args:
        left: A value for each query, (B, H, num_q_blocks, 1, block, 1), or for each key, B and H perhaps 1.
        right: A value for each of the others.

    Returns:
        The numbers of the keys and of the queries, int64.
    """
    dtype = torch.result_type(left, right)
    batch, heads = torch.broadcast_shapes(left.shape[:2], right.shape[:2])
    key, query = (
        x.to(dtype).expand(batch, heads, -1, -1, -1, -1)
        for x in sorted((left, right), key=lambda x: bool(x.shape[_KEY_AXIS] == 1))
    )
    # Realized, because torch 2.11's inductor fails on a view of something computed at a shifted index, as in cat.
    values = realize(torch.cat([realize(x.flatten(2)) for x in (key, query)], dim=-1))
    ordered, order = values.sort(dim=-1, stable=True)
    is_new = torch.nn.functional.pad(ordered[..., 1:] != ordered[..., :-1], (1, 0), value=True)
    start = torch.where(is_new, torch.arange(values.shape[-1], device=values.device), 0).cummax(-1).values
    numbers = realize(torch.empty_like(order).scatter(-1, order, order.gather(-1, start)))
    num_keys = key.shape[3] * key.shape[5]
    return numbers[..., :num_keys].view(key.shape), numbers[..., num_keys:].view(query.shape)
