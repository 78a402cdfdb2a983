"""What a formula reads at run time: tensors of O(S) elements, sizes, and masks that the model is given."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.fx import Node

from flexprefill_compile.torch_internals import guard_or_false

from ..graph.trace import TracedValue
from .elements import Capture, Element, Indices, NotLiftableError
from .formula import Formula


class Captures:
    """The captures of one formula, each read where the lifter can't go further.

    Attributes:
        placeholders: The node of the formula that stands for each capture.
    """

    def __init__(self, formula: Formula, traced: TracedValue, largest_mask: int) -> None:
        """Prepare to capture.

        Args:
            formula: What gains placeholders.
            traced: Where the captured values come from.
            largest_mask: Most elements of a graph input that is captured although query and key both index it.
        """
        self.placeholders: dict[Capture, Node] = {}
        self._formula = formula
        self._traced = traced
        self._largest_mask = largest_mask

    def read(self, node: Node, indices: Indices) -> Element:
        """Return the element of a traced tensor or size that exists at run time.

        Raises:
            NotLiftableError: It has an element for every query and key, and is not a mask that the model is given.
        """
        self._check_own_size(node, indices)
        capture = Capture(node, tuple(index if isinstance(index, int) else None for index in indices))
        if capture not in self.placeholders:
            self._check_computation(node)
            self.placeholders[capture] = self._formula.add_capture()
        return self._formula.read(self.placeholders[capture], indices)

    def _check_own_size(self, node: Node, indices: Indices) -> None:
        if not self._formula.depends_on_pair(indices):
            return
        if node.op != "placeholder" or node is self._traced.product:
            raise NotLiftableError(f"{_describe(node)} is computed for every query and key")
        num_elements = node.meta["val"].numel()
        if not guard_or_false(num_elements <= self._largest_mask):
            raise NotLiftableError(f"a mask of {num_elements} elements, more than {self._largest_mask}")

    def _check_computation(self, node: Node) -> None:
        """Refuse a capture whose own computation makes a tensor for every query and key."""
        scores = math.prod(self._traced.output.meta["val"].shape[-2:])  # numel() would pin the sizes
        waiting, seen = [node], set()
        while waiting:
            current = waiting.pop()
            if current in seen or current.op == "placeholder":
                continue
            seen.add(current)
            example = current.meta["val"]
            if current is self._traced.product or (
                isinstance(example, Tensor) and len(example.shape) > 1 and _is_at_least(example.numel(), scores)
            ):
                raise NotLiftableError(f"{_describe(node)} needs {_describe(current)}, which has the size of the mask")
            waiting.extend(current.all_input_nodes)


def _is_at_least(size: Any, bound: Any) -> bool:
    """Compare sizes, symbolic ones by the values they were seen with: a decision about cost that needs no guard."""
    hint = getattr(getattr(size, "node", None), "hint", size)
    bound_hint = getattr(getattr(bound, "node", None), "hint", bound)
    return hint is not None and bound_hint is not None and hint >= bound_hint > 1


def _describe(node: Node) -> str:
    return f"the result of {getattr(node.target, '__name__', node.target)}"
