"""What one case holds while it is drawn: its sizes, and the inputs that its code reads."""

from __future__ import annotations

import dataclasses

from .choices import Choices

BLOCK = 16


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a case, but for the number of queries.

    Attributes:
        batch: B.
        heads: H.
        kv_heads: Hkv.
        head_dim: D.
        value_dim: Dv.
        start: How many keys come before the first query's own.
        extra: How many keys come after the last query's own.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    start: int
    extra: int


@dataclasses.dataclass(frozen=True)
class Input:
    """An argument of the attention.

    Attributes:
        source: The code that makes it; S and T are the numbers of queries and keys.
        is_batched: Whether its first dimension is the batch.
    """

    source: str
    is_batched: bool


class Scope:
    """Draws for one case, and collects what its code needs.

    Attributes:
        choices: Where draws come from.
        sizes: The sizes.
        dtype: Of query, key and value, as torch spells it.
        is_dynamic: Whether the case is compiled with ``dynamic=True``, so that no length may be written out.
        inputs: The arguments of the attention, by name.
        is_one_sequence: Whether each row of the batch is one sequence: no mask packs several.
        says_positions: Whether the mask tells where the queries stand among the keys; a random one doesn't,
            nor one that is not causal.
        is_bshd: Whether query, key and value are handed over as (B, S, H, D).
    """

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        heads, kv_heads = choices.pick([(2, 2), (1, 1), (2, 1), (4, 2), (3, 3), (4, 1)])
        start = choices.pick([0, 0, 0, 0, 16, 7, 20])
        head_dim = choices.pick([16, 16, 24, 32])
        self.sizes = Sizes(
            batch=choices.pick([1, 2, 2, 3]),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=choices.pick([head_dim, head_dim, head_dim, 16, 40]),
            start=start,
            extra=choices.pick([0, 0, 0, 5, 16]) if start else 0,
        )
        self.is_dynamic = choices.chance(30)
        self.length = choices.between(BLOCK + 1, 3 * BLOCK)
        self.dtype = choices.pick(["float32"] * 6 + ["bfloat16", "float16"])
        self.inputs: dict[str, Input] = {}
        self.is_one_sequence = True
        self.says_positions = True
        self.is_bshd = False

    @property
    def key_length(self) -> int:
        """T: as many keys as the first length of the case has."""
        return self.sizes.start + self.length + self.sizes.extra

    def read(self, name: str, source: str, *, is_batched: bool = False) -> str:
        """Return the name of an input, added to the case."""
        self.inputs.setdefault(name, Input(source, is_batched))
        return name

    def query_length(self) -> str:
        """Return the number of queries as code."""
        return "query.shape[2]" if self.is_dynamic else self.choices.pick(["query.shape[2]", str(self.length)])

    def key_length_text(self) -> str:
        """Return the number of keys as code."""
        return "key.shape[2]" if self.is_dynamic else self.choices.pick(["key.shape[2]", str(self.key_length)])

    def start(self) -> str:
        """Return the number of keys before the first query as code."""
        ways = [str(self.sizes.start)]
        if not self.sizes.extra:
            ways.append("(key.shape[2] - query.shape[2])")
        if self.sizes.start:
            ways.append("start")
        way = self.choices.pick(ways)
        return self.read("start", str(self.sizes.start)) if way == "start" else way
