"""A later chunk of a prompt: the keys of earlier chunks, which every rank has, before those of this rank's stretch.

    key = cat((past, own), dim=2)                    past (B, Hkv, P, D), own (B, Hkv, S/n, D)

A graph can't show that the ranks have the same past. They compare it before each prefill, see ``agreement``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch.fx import Node

from flexprefill_compile.torch_internals import guard_or_false, statically_known_true

from ..graph.nodes import argument, example_of
from .positions import name_operation
from .refusals import refuse


class Chunk(NamedTuple):
    """Keys or values, (B, Hkv, P + S/n, D).

    Attributes:
        past: Of the earlier chunks, an input of the graph; None in the first chunk.
        own: Of this rank's stretch.
    """

    past: Node | None
    own: Node


@dataclasses.dataclass(frozen=True)
class Lengths:
    """What the sizes of a stretch are in the whole prompt. Numbers, or nodes of symbols.

    Attributes:
        stretch: S/n.
        past: P, 0 in the first chunk.
        num_ranks: n.
    """

    stretch: Any
    past: Any
    num_ranks: int

    def widen(self, size: Any) -> Any:
        """Return S for S/n, P + S for P + S/n, and any other size as it is."""
        if self.is_stretch(size):
            return size * self.num_ranks
        return size + example_of(self.stretch) * (self.num_ranks - 1) if self.is_all_keys(size) else size

    def is_stretch(self, size: Any) -> bool:
        """Tell whether a size is S/n."""
        return not isinstance(size, bool) and statically_known_true(size == example_of(self.stretch))

    def is_all_keys(self, size: Any) -> bool:
        """Tell whether a size is P + S/n, in a later chunk."""
        stretch, past = example_of(self.stretch), example_of(self.past)
        is_later = not statically_known_true(past == 0)
        return is_later and not isinstance(size, bool) and statically_known_true(size == past + stretch)


def split_chunk(x: Node, call: Node, length: Any, inputs: Sequence[Node]) -> Chunk:
    """Part the keys or values of an attention call.

    Args:
        x: (B, Hkv, P + S/n, D).
        call: The attention.
        length: S/n.
        inputs: Of the whole graph.

    Raises:
        SequenceParallelError: They aren't an input of the graph, then the stretch's.
    """
    num_keys = example_of(x).shape[2]
    if guard_or_false(num_keys == length):
        return Chunk(None, x)
    parts: Sequence[Any] = argument(x, 0, "tensors") if name_operation(x) in {"cat", "concat", "concatenate"} else ()
    dim = argument(x, 1, "dim", "axis")
    if len(parts) != 2 or dim not in (2, -2) or parts[0] not in inputs:
        raise refuse(call, f"{length} queries and {num_keys} keys, not those of a DynamicCache and then its own")
    past, own = parts
    if not guard_or_false(example_of(own).shape[2] == length):
        raise refuse(call, f"{length} queries, but {example_of(own).shape[2]} keys of its own")
    if statically_known_true(example_of(past).shape[2] == length):
        raise refuse(
            call,
            f"{length} queries after as many keys of earlier chunks: masks don't show which of the two a size is; "
            "cut the prompt elsewhere",
        )
    return Chunk(past, own)
