"""The grammar of FlexAttention calls: functions of one pair, block masks from them, and captured tensors."""

from __future__ import annotations

import dataclasses

from .scope import BLOCK, Scope


@dataclasses.dataclass(frozen=True)
class FlexCode:
    """The code of one FlexAttention call.

    Attributes:
        mask_mod: An expression of b, h, i and j.
        score_mod: An expression of score, b, h, i and j; "score" alone is none.
        lines: The body of ``attend``.
        scale: The factor on the scores.
        softcap: Of the scores; None is none.
        bias: What the score_mod adds, an expression of b, h, i and j; "" is nothing.
    """

    mask_mod: str
    score_mod: str
    lines: list[str]
    scale: float
    softcap: float | None
    bias: str


def draw_flex(scope: Scope) -> FlexCode:
    """Return a call of flex_attention with a block mask that is made where it is called."""
    choices, sizes = scope.choices, scope.sizes
    mask_mod = _draw_mask_mod(scope)
    softcap = 4.0 if choices.chance(15) else None
    bias = _draw_bias(scope) if choices.chance(25) else ""
    score_mod = "torch.tanh(score / 4.0) * 4.0" if softcap is not None else "score"
    score_mod += f" + {bias}" if bias else ""
    scale, scale_text = choices.pick([(sizes.head_dim**-0.5, ""), (0.5, "scale=0.5")])
    by_batch = "query.shape[0]" if "[b" in mask_mod or choices.chance(30) else "None"
    by_head = "query.shape[1]" if "[h" in mask_mod or choices.chance(30) else "None"
    block = choices.pick([BLOCK] * 8 + [32, 128])
    keywords = ["block_mask=block_mask"]
    keywords += ["score_mod=score_mod"] if score_mod != "score" else []
    keywords += [scale_text] if scale_text else []
    keywords += ["enable_gqa=True"] if sizes.heads != sizes.kv_heads else []
    lengths = "query.shape[2], key.shape[2]"
    lines = [
        f"block_mask = create_block_mask(mask_mod, {by_batch}, {by_head}, {lengths}, device='cpu', BLOCK_SIZE={block})",
        f"return flex_attention(query, key, value, {', '.join(keywords)})",
    ]
    return FlexCode(mask_mod, score_mod, lines, scale, softcap, bias)


def _draw_mask_mod(scope: Scope) -> str:
    choices, start = scope.choices, scope.sizes.start
    shift = choices.pick([str(start), "offset"]) if start else ""
    if shift == "offset":
        scope.read("offset", f"torch.tensor({start})")
    row = f"(i + {shift})" if shift else "i"
    causal = choices.pick([f"j <= {row}", f"{row} >= j", f"~(j > {row})", f"{row} - j >= 0"])
    parts = [f"({causal})"]
    for _ in range(choices.pick([0, 1, 1, 2])):
        width = choices.pick([8, 16, 23])
        part = choices.pick(
            [
                f"(i + {start} - j < {width})",
                "keep[b, j]",
                "(ids[b, i] == ids[b, j])" if start == 0 else "(ids[b, j] >= 0)",
                f"((i + {start}) // {width} == j // {width})",
                f"((j < 4) | (i + {start} - j < {width}))",
                "(j >= first[b])",
                f"(j % {width} != 1)",
                "(i - j < widths[h])",
            ]
        )
        parts.append(part)
    code = " & ".join(parts)
    if choices.chance(6):
        code = choices.pick([f"({code}) | (j < 3)", "j >= i", f"~({code})"])
    for name, (source, is_batched) in flex_inputs(scope).items():
        if f"{name}[" in code:
            scope.is_one_sequence &= name != "ids"
            scope.read(name, source, is_batched=is_batched)
    return code


def _draw_bias(scope: Scope) -> str:
    bias = scope.choices.pick(["slopes[h] * (j - i)", "table[(i - j).clamp(0, 31), h]", "0.1 * (j - i)"])
    for name, (source, is_batched) in flex_inputs(scope).items():
        if f"{name}[" in bias:
            scope.read(name, source, is_batched=is_batched)
    return bias


def flex_inputs(scope: Scope) -> dict[str, tuple[str, bool]]:
    """Return the tensors that the functions capture: the code that makes each, and whether it has a batch."""
    batch, heads = scope.sizes.batch, scope.sizes.heads
    return {
        "keep": (f"torch.arange(T) >= torch.randint(0, T // 2, ({batch}, 1))", True),
        "ids": (f"(torch.rand({batch}, T) < 0.1).cumsum(-1)", True),
        "first": (f"torch.randint(0, T // 2, ({batch},))", True),
        "widths": (f"torch.randint(4, 40, ({heads},))", False),
        "slopes": (f"2.0 ** -torch.arange(3, {heads} + 3)", False),
        "table": (f"torch.randn(32, {heads})", False),
    }
