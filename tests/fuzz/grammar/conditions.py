"""The grammar of conditions: which query sees which key, as boolean code over positions ``i`` and ``j``."""

from __future__ import annotations

from .scope import Scope

_PADDING = [
    "torch.arange(T) >= torch.randint(0, 12, ({batch}, 1))",
    "torch.arange(T) < T - torch.randint(0, 12, ({batch}, 1))",
]


def draw_condition(scope: Scope) -> str:
    """Return a boolean mask: causal, narrowed by other conditions, or once in a while not causal at all."""
    choices = scope.choices
    condition = draw_causal(scope)
    for _ in range(choices.pick([0, 1, 1, 2])):
        condition = join_both(scope, condition, draw_narrowing(scope, 2))
    if choices.chance(8):
        return draw_trap(scope, condition)
    return condition


def draw_causal(scope: Scope) -> str:
    """Return a condition that lets each query see the keys up to its own."""
    length, keys, start = scope.query_length(), scope.key_length_text(), scope.start()
    ones = f"torch.ones({length}, {keys}"
    ways = [
        "(j <= i)",
        "(i >= j)",
        "~(j > i)",
        "(j < i + 1)",
        "(i - j >= 0)",
        "torch.le(j, i)",
        "((j - i) <= 0)",
        "(j < i)",
        "(j <= i - 2)",
        f"{ones}, dtype=torch.bool).tril({start})",
        f"torch.tril({ones}), diagonal={start}).bool()",
        f"~{ones}, dtype=torch.bool).triu({start} + 1)",
        f"({ones}).triu({start} + 1) == 0)",
        f"(torch.triu({ones}), diagonal={start} + 1) < 0.5)",
        f"buffer[{start}:{start} + {length}, :{keys}]",
        f"buffer[{start}:][:{length}, :{keys}]",
        f"buffer[positions][:, :{keys}]",
        f"buffer.index_select(0, positions)[:, :{keys}]",
        f"buffer[None, None, {start}:{start} + {length}, :{keys}]",
        "(position_ids[:, None, :, None] >= j)",
    ]
    if scope.sizes.start and not scope.sizes.extra:
        square = f"torch.ones({length}, {length}, dtype=torch.bool).tril()"
        past = f"torch.ones({length}, {start}, dtype=torch.bool)"
        ways += [
            f"torch.cat([{past}, {square}], dim=-1)",
            f"torch.hstack([{past}, {square}])",
            f"F.pad({square}, ({start}, 0), value=True)",
        ]
    return _add_inputs(scope, scope.choices.pick(ways))


def draw_narrowing(scope: Scope, depth: int) -> str:
    """Return a condition that takes keys away."""
    choices = scope.choices
    if depth and choices.chance(25):
        a, b = draw_narrowing(scope, depth - 1), draw_narrowing(scope, depth - 1)
        return join_either(scope, a, b) if choices.chance(50) else join_both(scope, a, b)
    width, few = choices.pick([8, 16, 1, 23]), choices.pick([4, 1, 16])
    queries = f"ids[:, {scope.sizes.start}:{scope.sizes.start} + {scope.query_length()}]"
    way = choices.pick(
        [
            "pad[:, None, None, :].bool()",
            "keep[:, None, None, :]",
            f"(i - j < {width})",
            f"(j > i - {width})",
            f"((i - j).abs() < {width})",
            f"(i // {width} == j // {width})",
            f"(torch.div(i, {width}, rounding_mode='floor') == torch.div(j, {width}, rounding_mode='floor'))",
            f"({queries}[:, None, :, None] == ids[:, None, None, :])",
            f"({queries}.unsqueeze(1).unsqueeze(-1) - ids[:, None, None] == 0)",
            "(j < lengths[:, None, None, None])",
            "(j >= first[:, None, None, None])",
            "(pad[:, None, None, :] != 0)",
            "(pad.float()[:, None, None, :] > 0.5)",
            "pad.view(pad.shape[0], 1, 1, -1).to(torch.bool).expand(-1, 1, query.shape[2], -1)",
            f"(j < {few}).logical_or(i - j < {width})",
            f"(j % {width} != 1)",
            f"((i - j) % {few} == 0)",
            "given",
            "(i - j < widths[:, None, None])",
            "(keep[:, None, None, :] & (j >= 0))",
            f"torch.cat([pad[:, :{few}] > -1, pad[:, {few}:] > 0], 1)[:, None, None]",
            "((i.long() >> 2) >= (j.long() >> 2))",
            "(torch.minimum(i, j) > -1)",
            "torch.stack(list(pad.bool().unbind(0)))[:, None, None, :]",
            "pad[:, None, None, :].repeat(1, 1, query.shape[2], 1).bool()",
        ]
    )
    if "ids" in way:
        scope.is_one_sequence = False
    return _add_inputs(scope, way)


def join_both(scope: Scope, a: str, b: str) -> str:
    """Return a condition that holds where both do."""
    a, b = _in_parentheses(a), _in_parentheses(b)
    return scope.choices.pick(
        [
            f"({a} & {b})",
            f"torch.logical_and({a}, {b})",
            f"{a}.logical_and({b})",
            f"({a} * {b})",
            f"~(~{a} | ~{b})",
            f"torch.where({a}, {b}, False)",
            f"torch.where(~{a}, False, {b})",
            f"({a} & {b}.bool())",
            f"({a}.int() + {b}.int() == 2)",
            f"(({a}.float() * {b}.float()) > 0)",
            f"torch.bitwise_and({a}, {b})",
            f"torch.logical_not(torch.logical_or(~{a}, ~{b}))",
        ]
    )


def join_either(scope: Scope, a: str, b: str) -> str:
    """Return a condition that holds where one of two does."""
    a, b = _in_parentheses(a), _in_parentheses(b)
    return scope.choices.pick(
        [
            f"({a} | {b})",
            f"torch.logical_or({a}, {b})",
            f"~(~{a} & ~{b})",
            f"torch.where({a}, True, {b})",
            f"({a}.int() + {b}.int() > 0)",
        ]
    )


def draw_trap(scope: Scope, condition: str) -> str:
    """Return a condition that looks causal and isn't, or is and doesn't look it."""
    scope.says_positions = False
    few, condition = scope.choices.pick([1, 3, 16]), _in_parentheses(condition)
    return scope.choices.pick(
        [
            f"(j <= i + {few})",
            f"({condition} | (j < {few}))",
            "(i <= j)",
            f"{condition}.logical_xor(j == i)",
            f"({condition} ^ (i - j == {few}))",
            "(i == i)",
            f"torch.where(i < {few}, j <= {few}, {condition})",
        ]
    )


def _add_inputs(scope: Scope, code: str) -> str:
    """Add the inputs that a condition names."""
    sizes = scope.sizes
    start, batch = sizes.start, sizes.batch
    sources = {
        "buffer": ("torch.ones(96, 96, dtype=torch.bool).tril()", False),
        "positions": (f"torch.arange({start}, {start} + S)", False),
        "position_ids": (f"torch.arange({start}, {start} + S).expand({batch}, -1)", True),
        "ids": (f"(torch.rand({batch}, T) < 0.1).cumsum(-1)", True),
        "lengths": (f"torch.randint(T // 2, T + 1, ({batch},))", True),
        "first": (f"torch.randint(0, T // 2, ({batch},))", True),
        "given": (f"torch.rand({batch}, 1, S, T) < 0.7", True),
        "widths": (f"torch.randint(4, 40, ({sizes.heads},))", False),
        "keep": (f"torch.arange(T) >= torch.randint(0, T // 2, ({batch}, 1))", True),
    }
    for name, (source, is_batched) in sources.items():
        if any(word == name for word in _words(code)):
            scope.read(name, source, is_batched=is_batched)
    if "pad" in _words(code) and "pad" not in scope.inputs:
        scope.read("pad", scope.choices.pick(_PADDING).format(batch=batch), is_batched=True)
    return code


def _in_parentheses(code: str) -> str:
    """Return code to which an operator or a method may be applied."""
    return f"({code})" if code.startswith("~") else code


def _words(code: str) -> set[str]:
    return set("".join(c if c.isalnum() or c == "_" else " " for c in code).split())
