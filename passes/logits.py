"""Follow the logits of a softmax back to the scores Q K^T that they are made of. Never mutates.

logits = tanh(matmul(query, key.mT) * scale / 50) * 50 + mask    ->  the matmul, and the steps from it to the logits
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor
from torch.fx import Node

from flexprefill_compile.passes.attention_site import example_of
from flexprefill_compile.passes.operations import (
    CASTS,
    DROPOUT,
    ELEMENTWISE,
    EXPANSIONS,
    PRODUCTS,
    REARRANGEMENTS,
    TRANSPOSITIONS,
    VIEWS,
    argument,
    operation,
    product_operands,
)

STEPS = ELEMENTWISE | VIEWS | CASTS
# Through these the scores may still be recognised as such, though not understood.
LOOSE_STEPS = STEPS | DROPOUT | EXPANSIONS | TRANSPOSITIONS | REARRANGEMENTS
MATRICES = 3  # dimensions of a batch of matrices


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
    """Find the products that logits depend on through STEPS alone."""
    products, others, seen, pending = [], [], {logits}, [logits]
    while pending:
        node = pending.pop()
        if is_product(node):
            products.append(node)
            sources = [argument(node, 0, "input", "self")] if operation(node) == "baddbmm" else []
        elif operation(node) in STEPS:
            sources = node.all_input_nodes
        else:
            others.append(node)
            sources = []
        new = [source for source in sources if isinstance(source, Node) and source not in seen]
        seen.update(new)
        pending.extend(new)

    steps = dict.fromkeys(products)
    for node in logits.graph.nodes:
        if node in seen and node not in others and any(source in steps for source in node.all_input_nodes):
            steps[node] = None
    order = [node for node in logits.graph.nodes if node in steps]
    return LogitsTrace(products, order, others)


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
        if operation(node) in LOOSE_STEPS:
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
            if operation(user) in LOOSE_STEPS and user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def _is_einsum_product(node: Node) -> bool:
    return operation(node) == "einsum" and sum(map(_is_batch_of_matrices, node.all_input_nodes)) > 1


def _is_batch_of_matrices(operand: object) -> bool:
    example = example_of(operand)
    return isinstance(example, Tensor) and example.dim() >= MATRICES
