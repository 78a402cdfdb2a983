"""What the selections under one mask share, computed once in the graph for all its layers.

    mask = (key <= query) & pad[batch, key]

becomes, before the first of its layers,

    certain, possible, required, rows, row_mask, ... = what block selection has to know of the mask

in which no tensor has S x S elements. The mask itself is computed by nobody then, and inductor drops it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from flexprefill_compile.block_masks.layout import AttentionSizes, count_blocks, unpack_blocks
from flexprefill_compile.block_masks.masks.facts import MaskFacts, describe_mask, representative_indices
from flexprefill_compile.block_masks.masks.intervals import BlockBounds, classify_blocks
from flexprefill_compile.block_masks.observing import sample_rows

from ..graph.edits import edited_inputs, shares_memory
from ..graph.nodes import example_of
from ..graph.trace import TracedValue, ancestors_of, inline
from ..lift.elements import Capture
from ..lift.lifted_site import LiftedMasks, LiftedSite
from ..lift.scores import ElementFunction
from ..match.site import FlexMods
from .cpu_workarounds import realize_on_cpu


@dataclasses.dataclass(frozen=True)
class SharedMask:
    """Nodes that the layers of one mask share.

    Attributes:
        facts: The fields of a MaskFacts.
        captures: What the mask_mod takes after its indices.
        module: The mask_mod.
        name: Of the mask_mod as a submodule.
        sizes: Of the attention calls, nodes or constants.
    """

    facts: MaskFacts
    captures: tuple[Any, ...]
    module: GraphModule
    name: str
    sizes: AttentionSizes


class MaskSharing:
    """Inserts into one graph what each of its masks needs, when a layer first asks.

    Attributes:
        module: The graph's module.
        graph: The graph.
        lifted: What masks of the graph were lifted to.
    """

    def __init__(self, module: GraphModule, block_size: int) -> None:
        self.module = module
        self.graph = module.graph
        self.block_size = block_size
        self.lifted: LiftedMasks = {}
        self._masks: dict[object, SharedMask] = {}
        self._captures: dict[object, Any] = {}
        self._biases: dict[object, Node] = {}
        self._score_names: dict[str, str] = {}

    def describe(self, lifted: LiftedSite, query: Node, key: Node) -> SharedMask:
        """Return what the selections of a site's mask take. New nodes go where the graph is inserting."""
        mask = lifted.parts.mask
        assert mask is not None
        captures = self.capture(mask, lifted.traced)
        sizes = self.measure(query, key)
        tables = lifted.site.scores.block_mask if isinstance(lifted.site.scores, FlexMods) else None
        identity = (mask.module.code, captures, sizes, tables and tables[2:6])
        if identity not in self._masks:
            name = f"flexprefill_mask_{len(self._masks) + 1}"
            facts = self._insert_facts(lifted, mask, captures, sizes, tables)
            self._masks[identity] = SharedMask(facts, captures, mask.module, name, sizes)
        return self._masks[identity]

    def bias_of_representatives(self, lifted: LiftedSite, shared: SharedMask) -> Node | None:
        """Return the node of what the model adds to the scores of the representative queries."""
        bias = lifted.parts.bias
        if bias is None:
            return None
        captures = self.capture(bias, lifted.traced)
        identity = (bias.module.code, captures, shared.facts.rows)
        if identity not in self._biases:
            uses = _IndexUse(bias)

            def compute(rows: Tensor, batch: int, heads: int, key_length: int, *values: Any) -> tuple[Tensor]:
                indices = representative_indices(
                    rows, batch if uses.batch else 1, heads if uses.heads else 1, key_length
                )
                return (bias.module(*indices, *values),)

            sizes = shared.sizes
            arguments = (shared.facts.rows, sizes.batch, sizes.heads, sizes.key_length, *captures)
            (self._biases[identity],) = inline(self.graph, compute, arguments)
        return self._biases[identity]

    def name_of_score(self, score_mod: GraphModule) -> str:
        """Return the submodule name of a score_mod, one for all that are equal."""
        return self._score_names.setdefault(score_mod.code, f"flexprefill_score_{len(self._score_names) + 1}")

    def check_mask(self, lifted: LiftedSite, query: Node, key: Node, materialised: Node) -> Node:
        """Insert the comparison of a mask with its formula; return the node to use in place of ``query``."""
        mask, bias = lifted.parts.mask, lifted.parts.bias
        assert mask is not None
        sizes = self.measure(query, key)
        captures = [self.capture(function, lifted.traced) for function in (mask, bias) if function is not None]
        device = example_of(query).device

        def check(query: Tensor, materialised: Tensor, *values: Any) -> tuple[Tensor]:
            shape, values = values[:4], values[4:]
            indices = [torch.arange(n, device=device).view(-1, *[1] * (3 - dim)) for dim, n in enumerate(shape)]
            visible = mask.module(*indices, *values[: len(captures[0])])
            added = None if bias is None else bias.module(*indices, *values[len(captures[0]) :])
            return (torch.ops.flexprefill.check_mask(query, materialised, visible, added),)

        nodes = inline(self.graph, check, (query, materialised, *sizes, *(c for group in captures for c in group)))
        return nodes[0]

    def sample_rows(
        self, lifted: LiftedSite, query: Node, key: Node, count: int
    ) -> tuple[Node, Node | None, Node | None]:
        """Insert the choice of some query rows, which keys they see, and what is added to their scores.

        Returns:
            The nodes of (R,), and of what broadcasts to (B, H, R, Skv): bool, None for causal, and None for no bias.
        """
        functions = () if lifted.is_plain else tuple(f for f in (lifted.parts.mask, lifted.parts.bias) if f is not None)
        captures = [self.capture(function, lifted.traced) for function in functions]
        device = example_of(query).device

        def sample(batch: int, heads: int, query_length: int, key_length: int, *values: Any) -> list[Tensor]:
            rows = sample_rows(count, query_length, device)
            positions = [torch.arange(batch, device=device), torch.arange(heads, device=device), rows]
            positions.append(torch.arange(key_length, device=device))
            indices = [x.view(-1, *[1] * (3 - dim)) for dim, x in enumerate(positions)]
            remaining = iter(values)
            return [
                rows,
                *(f.module(*indices, *(next(remaining) for _ in c)) for f, c in zip(functions, captures, strict=True)),
            ]

        sizes = self.measure(query, key)
        rows, *found = inline(self.graph, sample, (*sizes, *(c for group in captures for c in group)))
        visible, row_bias, *_ = (*found, None, None)
        return rows, visible, row_bias

    def capture(self, function: ElementFunction, traced: TracedValue) -> tuple[Any, ...]:
        """Return the nodes of a function's captures, as they are when the mask is built."""
        missing = [c for c in function.captures if self._identify(c, traced) not in self._captures]
        if missing:
            with self.graph.inserting_before(_first_after(traced.leaves, self.graph)):
                nodes = self._insert_captures(missing, traced)
            self._captures |= {self._identify(c, traced): n for c, n in zip(missing, nodes, strict=True)}
        return tuple(self._captures[self._identify(c, traced)] for c in function.captures)

    def _identify(self, capture: Capture, traced: TracedValue) -> object:
        """Return what two captures have in common if they are one value: their computation and its leaves."""
        computation = _print_computation(
            capture.node, dict(zip(traced.graph.find_nodes(op="placeholder"), traced.leaves, strict=True))
        )
        return computation, capture.positions

    def _insert_captures(self, captures: Sequence[Capture], traced: TracedValue) -> list[Any]:
        leaf_of = dict(zip(traced.graph.find_nodes(op="placeholder"), traced.leaves, strict=True))
        computed = [c for c in captures if c.node not in leaf_of or any(p is not None for p in c.positions)]
        nodes: dict[Capture, Any] = {}
        if computed:
            reader = _CaptureReader(traced, computed)
            inlined = inline(self.graph, reader.read, traced.leaves)
            nodes = {c: self._settle(n) for c, n in zip(computed, inlined, strict=True)}
        for capture in captures:
            if capture not in nodes:
                nodes[capture] = self._snapshot(leaf_of[capture.node])
        return [nodes[capture] for capture in captures]

    def _settle(self, node: Node) -> Node:
        """Keep inductor's CPU template from computing a capture itself."""
        example = example_of(node)
        if not isinstance(example, Tensor):
            return node
        return realize_on_cpu(self._call, node, example.device)

    def _snapshot(self, leaf: Node) -> Node:
        """Copy an input that the graph writes into, later on: caches move their positions."""
        example = example_of(leaf)
        if not isinstance(example, Tensor):
            return leaf
        is_edited = any(shares_memory(edited, example) for node in self.graph.nodes for edited in edited_inputs(node))
        return self._call(torch.clone, leaf) if is_edited else leaf

    def _call(self, target: Any, *args: Any) -> Node:
        node = self.graph.call_function(target, args)
        with torch.no_grad():
            node.meta = {"example_value": target(*map(example_of, args))}
        return node

    def measure(self, query: Node, key: Node) -> AttentionSizes:
        """Return the sizes, symbolic ones as nodes."""
        batch, heads, query_length, _ = example_of(query).shape
        return AttentionSizes(
            batch=self._size(query, 0, batch),
            heads=int(heads),
            query_length=self._size(query, 2, query_length),
            key_length=self._size(key, 2, example_of(key).shape[2]),
        )

    def _size(self, tensor: Node, dim: int, size: Any) -> Any:
        if isinstance(size, int):
            return size
        identity = ("size", str(size))
        if identity not in self._captures:
            self._captures[identity] = self._call(torch.ops.aten.sym_size.int, tensor, dim)
        return self._captures[identity]

    def _insert_facts(
        self, lifted: LiftedSite, mask: ElementFunction, captures: tuple[Any, ...], sizes: AttentionSizes, tables: Any
    ) -> MaskFacts:
        device = example_of(lifted.site.query).device
        num_captures = len(captures)

        def compute(*values: Any) -> tuple[Tensor, ...]:
            captured, measured = values[:num_captures], AttentionSizes(*values[num_captures : num_captures + 4])
            if tables is None:
                bounds = classify_blocks(mask.module, captured, measured, self.block_size, device)
            else:
                bounds = _read_tables(values[-4:], count_blocks(measured.key_length, self.block_size))
            # A ragged last block is left to the mask_mod, whose kernel minds where the keys end.
            is_whole = torch.arange(bounds.certain.shape[-1], device=device) < measured.key_length // self.block_size
            bounds = BlockBounds(bounds.certain & is_whole, bounds.possible)
            offset = lifted.bounds.compute_offset(mask, captured, measured.key_length - measured.query_length)
            return tuple(
                describe_mask(mask.module, captured, measured, bounds, offset, lifted.bounds.is_packed, self.block_size)
            )

        nodes: list[Any] = list(inline(self.graph, compute, (*captures, *sizes, *(tables[2:6] if tables else ()))))
        return MaskFacts(*nodes)


class _CaptureReader(Interpreter):
    """Runs what computes a mask just as far as its captures, and returns them."""

    def __init__(self, traced: TracedValue, captures: Sequence[Capture]) -> None:
        super().__init__(GraphModule(traced.constants, traced.graph), garbage_collect_values=False)
        self.captures = captures
        self.needed = ancestors_of(*(capture.node for capture in captures))

    def read(self, *leaves: Any) -> tuple[Any, ...]:
        for node, leaf in zip(self.graph.find_nodes(op="placeholder"), leaves, strict=True):
            self.env[node] = leaf
        for node in self.graph.nodes:
            if node in self.needed and node.op != "placeholder":
                self.env[node] = self.run_node(node)
        return tuple(self._select(capture) for capture in self.captures)

    def _select(self, capture: Capture) -> Any:
        value = self.env[capture.node]
        if not capture.positions:
            return value
        return value[tuple(slice(None) if position is None else position for position in capture.positions)]


def _print_computation(node: Node, leaf_of: dict[Node, Node]) -> tuple[str, ...]:
    """Describe how a traced value is computed, so that equal descriptions are equal values."""
    ancestors = ancestors_of(node)
    needed = [n for n in node.graph.nodes if n in ancestors]
    names = {n: f"%{i}" for i, n in enumerate(needed)}
    lines = []
    for n in needed:
        if n in leaf_of:
            lines.append(f"{names[n]} = leaf {leaf_of[n].name}")
        else:
            arguments = torch.fx.map_arg((n.args, n.kwargs), lambda a: cast("Any", names[a]))
            lines.append(f"{names[n]} = {n.target} {arguments}")
    return tuple(lines)


def _first_after(leaves: tuple[Node, ...], graph: Graph) -> Node:
    """Return the first node after all of ``leaves`` and after the inputs, which come first in a graph."""
    remaining = set(leaves)
    node: Node
    for node in graph.nodes:
        if not remaining and node.op not in ("placeholder", "get_attr"):
            return node
        remaining.discard(node)
    raise ValueError("the leaves are not in the graph")


def _read_tables(tables: Sequence[Any], num_k_blocks: int) -> BlockBounds:
    """Read the blocks that a FlexAttention call lists: those under its mask_mod, then the full ones, if any."""
    partial = unpack_blocks(tables[0], tables[1], num_k_blocks)
    if tables[2] is None:
        return BlockBounds(certain=torch.zeros_like(partial), possible=partial)
    full = unpack_blocks(tables[2], tables[3], num_k_blocks)
    return BlockBounds(certain=full, possible=partial | full)


class _IndexUse:
    """Which indices a function reads."""

    def __init__(self, function: ElementFunction) -> None:
        placeholders = {node.name: node for node in function.module.graph.find_nodes(op="placeholder")}
        self.batch = bool(placeholders["batch"].users)
        self.heads = bool(placeholders["head"].users)
