"""Follow the logits of a softmax back to the scores Q K^T that they are made of. Never mutates.

logits = tanh(matmul(query, key.mT) * scale / 50) * 50 + mask    ->  the matmul, and the steps from it to the logits
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor
from torch.fx import Node

from ..graph.nodes import argument, example_of, first_input
from ..graph.operations import (
    CASTS,
    DROPOUT,
    ELEMENTWISE,
    EXPANSIONS,
    PRODUCTS,
    REARRANGEMENTS,
    TRANSPOSITIONS,
    VIEWS,
    is_last_dimension,
    operation,
    product_operands,
)

# Enough to tell that attention is there; a form that uses those beyond ELEMENTWISE, VIEWS and CASTS is reported.
_LOOSE_STEPS = ELEMENTWISE | VIEWS | CASTS | DROPOUT | EXPANSIONS | TRANSPOSITIONS | REARRANGEMENTS
_MATRICES = 3  # dimensions of a batch of matrices


class LogitsTrace(NamedTuple):
    """What logits are made of.

    Attributes:
        products: The products of batches of matrices that the logits depend on element by element.
        steps: The nodes that depend so on any of them, the products included, in the order of the graph.
        others: What else enters: masks, biases, and whatever is not understood.
    """

    products: list[Node]
    steps: list[Node]
    others: list[Node]


def trace_logits(logits: Node) -> LogitsTrace:
    """Find the products that logits depend on through elementwise operations, casts and views alone."""
    products, others, seen, pending = [], [], {logits}, [logits]
    while pending:
        node = pending.pop()
        sources = _step_inputs(node)
        if is_product(node):
            products.append(node)
        elif not sources:
            others.append(node)
        new = [source for source in sources if source not in seen]
        seen.update(new)
        pending.extend(new)

    steps = set(products)
    for node in logits.graph.nodes:
        if node in seen and not steps.isdisjoint(_step_inputs(node)):
            steps.add(node)
    return LogitsTrace(products, [node for node in logits.graph.nodes if node in steps], others)


def _step_inputs(node: Node) -> list[Node]:
    """Return the tensors that a step takes, or the bias of a product; none for what is no step."""
    name = operation(node)
    if name == "baddbmm" and is_product(node):
        bias = argument(node, 0, "input", "self")
        return [bias] if isinstance(bias, Node) else []
    if name in VIEWS | CASTS:  # beside it they may take a size, or another tensor's dtype
        source = first_input(node)
        return [source] if source is not None else []
    is_larger_of_two = name in {"max", "min"} and isinstance(argument(node, 1, "other"), Node)
    return node.all_input_nodes if name in ELEMENTWISE or is_larger_of_two else []


def undo_row_shift(logits: Node) -> Node:
    """Return what logits are before the maximum of each row is taken off, which changes no softmax."""
    unshifted, shift = argument(logits, 0, "input", "self"), argument(logits, 1, "other")
    is_difference = operation(logits) == "sub" and not {"alpha", "out"} & logits.kwargs.keys()
    if not (is_difference and isinstance(unshifted, Node) and isinstance(shift, Node)):
        return logits
    largest = shift.args[0] if operation(shift) == "getitem" and shift.args[1] == 0 else shift  # of values and indices
    is_row_maximum = (
        isinstance(largest, Node)
        and operation(largest) in {"max", "amax"}
        and argument(largest, 0, "input", "self") is unshifted
        and is_last_dimension(argument(largest, 1, "dim"), example_of(logits).dim())
        and argument(largest, 2, "keepdim") is True
    )
    return unshifted if is_row_maximum else logits


def is_product(node: Node) -> bool:
    """Tell whether a node multiplies two batches of matrices, not a batch by one matrix of weights."""
    return operation(node) in PRODUCTS and all(map(_is_batch_of_matrices, product_operands(node)))


def holds_product(nodes: Iterable[Node]) -> bool:
    """Tell whether any of some tensors is made of a product of batches of matrices, loosely."""
    pending = list(nodes)
    seen = set(pending)
    while pending:
        node = pending.pop()
        if is_product(node) or _is_einsum_product(node):
            return True
        if operation(node) in _LOOSE_STEPS:
            new = [source for source in node.all_input_nodes if source not in seen]
            seen.update(new)
            pending.extend(new)
    return False


def feeds_product(node: Node) -> bool:
    """Tell whether a tensor goes, loosely, into a product of batches of matrices."""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if is_product(user) or _is_einsum_product(user):
                return True
            if operation(user) in _LOOSE_STEPS and user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def _is_einsum_product(node: Node) -> bool:
    return operation(node) == "einsum" and sum(map(_is_batch_of_matrices, node.all_input_nodes)) > 1


def _is_batch_of_matrices(operand: object) -> bool:
    example = example_of(operand)
    return isinstance(example, Tensor) and example.dim() >= _MATRICES
