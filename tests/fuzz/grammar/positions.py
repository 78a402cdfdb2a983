"""Positions of queries and keys, as models compute them: ranges, slices, inputs, sums; in any dtype."""

from __future__ import annotations

from .scope import Scope

# int8 and uint8 wrap around, float16 and bfloat16 round; the last numbers are multiplied until they do.
_CASTS = [".int()", ".float()", ".to(torch.int16)", ".to(torch.float64)"]
_NARROW_CASTS = [".to(torch.uint8)", ".to(torch.int8)", ".bfloat16()", ".half()"]


def draw_key_positions(scope: Scope) -> str:
    """Return a vector of the keys' positions."""
    length = scope.key_length_text()
    vector = scope.choices.pick(
        [
            f"torch.arange({length})",
            f"torch.arange({length}, device=query.device)",
            f"torch.arange(0, {length}, 1)",
            f"torch.arange({length} + 4)[:{length}]",
            f"(torch.ones({length}, dtype=torch.long).cumsum(0) - 1)",
            f"torch.arange({length} - 1, -1, -1).flip(0)",
        ]
    )
    return vector + _draw_cast(scope)


def draw_query_positions(scope: Scope) -> str:
    """Return a vector of the queries' positions among the keys."""
    length, keys, start = scope.query_length(), scope.key_length_text(), scope.start()
    ways = [
        f"(torch.arange({length}) + {start})",
        f"torch.arange({start}, {start} + {length})",
        f"torch.arange({keys})[{start}:{start} + {length}]",
        "positions",
        f"(torch.arange({length}) + offset)",
    ]
    if scope.sizes.start == 0:
        ways.insert(0, f"torch.arange({length})")
    way = scope.choices.pick(ways)
    if way == "positions":
        scope.read("positions", f"torch.arange({scope.sizes.start}, {scope.sizes.start} + S)")
    if "offset" in way:
        scope.read("offset", f"torch.tensor({scope.sizes.start})")
    return way + _draw_cast(scope)


def _draw_cast(scope: Scope) -> str:
    return scope.choices.pick(_CASTS) if scope.choices.chance(12) else ""


def draw_pair(scope: Scope) -> tuple[str, str]:
    """Return the positions of queries as a column and of keys as a row, to be compared with each other."""
    choices = scope.choices
    rows, columns = draw_query_positions(scope), draw_key_positions(scope)
    row_view = choices.pick(["[:, None]", ".unsqueeze(1)", ".view(-1, 1)", ".reshape(-1, 1)", "[None, None, :, None]"])
    column_view = choices.pick(["[None, :]", "", ".unsqueeze(0)", ".view(1, -1)", "[None, None, None, :]"])
    if choices.chance(4):
        cast, factor = choices.pick(_NARROW_CASTS), choices.pick([1, 7, 100])
        rows, columns = (f"({x} * {factor}){cast}" for x in (rows, columns))
    return rows + row_view, columns + column_view
