"""Layouts of query, key and value, numbers in them that are not finite, and views of the output."""

from __future__ import annotations

import dataclasses

from .scope import BLOCK, Scope


@dataclasses.dataclass(frozen=True)
class Operands:
    """How query, key and value come about.

    Attributes:
        lines: The body of ``operands(...)``, which returns the three as (B, heads, length, D).
        arguments: The names of the inputs that it takes.
    """

    lines: list[str]
    arguments: list[str]


def draw_operands(scope: Scope) -> Operands:
    """Return three tensors in layouts of their own, three views of one buffer, or transpositions in the graph."""
    choices, sizes = scope.choices, scope.sizes
    if sizes.start == 0 and sizes.head_dim == sizes.value_dim and choices.chance(15):
        return _draw_fused(scope)
    is_bshd = scope.is_bshd = choices.chance(25)
    layout = _draw_layout(scope)
    for name, heads, length, width in (
        ("query", sizes.heads, "S", sizes.head_dim),
        ("key", sizes.kv_heads, "T", sizes.head_dim),
        ("value", sizes.kv_heads, "T", sizes.value_dim),
    ):
        layout = layout if choices.chance(70) else _draw_layout(scope)
        shape = (heads, length) if not is_bshd else (length, heads)
        scope.read(name, layout.format(b=sizes.batch, n=shape[0], l=shape[1], d=width), is_batched=True)
    names = ["query", "key", "value"]
    transpose = choices.pick([".transpose(1, 2)", ".permute(0, 2, 1, 3)", ".swapaxes(1, 2)"]) if is_bshd else ""
    return Operands([f"{name} = {name}{transpose}" for name in names if transpose], names)


def _draw_layout(scope: Scope) -> str:
    return scope.choices.pick(
        [
            "randn({b}, {n}, {l}, {d})",
            "randn({b}, {l}, {n}, {d}).transpose(1, 2)",
            "randn({b}, {n}, {l}, 2 * {d})[..., ::2]",
            "randn({b}, {n}, {l} + 3, {d})[:, :, 3:]",
            "randn({b}, {n}, {l}, {d} + 5)[..., :{d}]",
            "randn({n}, {b}, {l}, {d}).transpose(0, 1)",
            "randn({b}, {n}, {d}, {l}).mT",
            "randn(1, {n}, {l}, {d}).expand({b}, -1, -1, -1)",
        ]
    )


def _draw_fused(scope: Scope) -> Operands:
    """Return three parts of one tensor, as of one projection."""
    sizes = scope.sizes
    widths = [sizes.head_dim * n for n in (sizes.heads, sizes.kv_heads, sizes.kv_heads)]
    scope.read("fused", f"randn({sizes.batch}, S, {sum(widths)})", is_batched=True)
    to_heads = scope.choices.pick(
        [
            f".unflatten(-1, (-1, {sizes.head_dim})).transpose(1, 2)",
            f".view(*fused.shape[:2], -1, {sizes.head_dim}).transpose(1, 2)",
            f".reshape(fused.shape[0], fused.shape[1], -1, {sizes.head_dim}).permute(0, 2, 1, 3)",
        ]
    )
    return Operands([f"query, key, value = (part{to_heads} for part in fused.split({widths}, -1))"], ["fused"])


def draw_key_heads(scope: Scope) -> str:
    """Return how key and value heads are repeated for the query heads that share them; "" leaves it to the call."""
    sizes = scope.sizes
    group = sizes.heads // sizes.kv_heads
    if group == 1:
        return ""
    ways = [
        "",
        f"{{x}}.repeat_interleave({group}, dim=1)",
        f"{{x}}[:, :, None].expand(-1, -1, {group}, -1, -1).reshape({{x}}.shape[0], -1, *{{x}}.shape[2:])",
        f"torch.repeat_interleave({{x}}, {group}, 1)",
        f"{{x}}.unsqueeze(2).repeat(1, 1, {group}, 1, 1).flatten(1, 2)",
        f"{{x}}.repeat(1, {group}, 1, 1)",  # in another order: query head h attends with key head h % Hkv
    ]
    if sizes.kv_heads == 1:
        ways.append(f"{{x}}.expand(-1, {group}, -1, -1)")
    return scope.choices.pick(ways)


def draw_poison(scope: Scope) -> list[str]:
    """Return lines that put a number that isn't finite into an input; most often none."""
    if not scope.choices.chance(10):
        return []
    name = scope.choices.pick([name for name in ("query", "key", "value", "fused") if name in scope.inputs])
    token = scope.choices.pick([9, 0, BLOCK])
    index = {"fused": f"{token}, 3"}.get(name, f"{token}, 0, 3" if scope.is_bshd else f"0, {token}, 3")
    return [f"{name}[-1, {index}] = {scope.choices.pick(['torch.nan', 'torch.inf', '-torch.inf'])}"]


def draw_tail(scope: Scope) -> str:
    """Return what becomes of the output: views that depend on its layout."""
    is_by_token = "fused" in scope.inputs or scope.is_bshd
    view = ["out.transpose(1, 2).view(out.shape[0], out.shape[2], -1)"] if is_by_token else []
    return scope.choices.pick(
        [
            *["out"] * 5,
            *view,
            "out.transpose(1, 2)",
            "out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1)",
            "out.transpose(1, 2).flatten(2)",
            "out.transpose(1, 2).contiguous()",
            "out.contiguous()",
            "torch.empty_like(out).copy_(out)",
        ]
    )
