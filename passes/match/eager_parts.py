"""Take attention that a model wrote out apart: query, key, value, what the scores and what the weights go through.

Never mutates. See eager.py.
"""

from __future__ import annotations

from typing import NamedTuple

from torch.fx import Node

from ..graph.nodes import argument, example_of, first_input
from ..graph.operations import CASTS, DROPOUT, VIEWS, is_last_dimension, live_users, operation, product_operands
from .logits import LogitsTrace, holds_product, is_product, trace_logits
from .operands import Operand, split_heads, transpose_back


class WeightsTrace(NamedTuple):
    """What becomes of attention weights.

    Attributes:
        products: Those of the weights with a value.
        steps: The softmax, then the casts, views and dropout of its result.
        others: What else uses any of these.
    """

    products: list[Node]
    steps: list[Node]
    others: list[Node]


class Parts(NamedTuple):
    """The nodes of an attention that is written out, as far as the form of it tells."""

    query: Operand
    key: Operand
    value: Operand
    logits: LogitsTrace
    weights: WeightsTrace

    @property
    def output(self) -> Node:
        """The product of the weights with the value."""
        return self.weights.products[0]


def read_parts(softmax: Node, logits: Node) -> Parts | str:
    """Take an attention apart, or return what about it is not understood."""
    trace, weights = trace_logits(logits), _follow_weights(softmax)
    if not is_last_dimension(argument(softmax, 1, "dim"), example_of(logits).dim()):
        return "softmax over another dimension than the last"
    if not weights.products:
        return "weights that go through more than casts, views and dropout"
    if len(trace.products) != 1 or holds_product(trace.others):
        return "logits of more than one product and elementwise operations"
    scores, output = trace.products[0], weights.products[0]
    first, second = product_operands(scores)
    operands = (
        split_heads(Operand(first, scores)),
        transpose_back(Operand(second, scores)),
        split_heads(Operand(product_operands(output)[1], output)),
    )
    query, key, value = operands
    if query is None or key is None or value is None:
        return "query, key or value not known to be (B, H, S, D)"
    return Parts(query, key, value, trace, weights)


def _follow_weights(softmax: Node) -> WeightsTrace:
    products, steps, others = [], [softmax], []
    for node in steps:  # which grows meanwhile
        for user in live_users(node):
            if is_product(user) and product_operands(user)[0] is node and product_operands(user)[1] is not node:
                products.append(user)
            elif operation(user) in CASTS | VIEWS | DROPOUT and first_input(user) is node:
                steps.append(user)
            else:
                others.append(user)
    return WeightsTrace(products, steps, others)
