"""The grammar of attention itself: a call of SDPA in each of its overloads, or written out."""

from __future__ import annotations

import dataclasses

from .masks import MaskCode, draw_mask
from .scope import Scope
from .tensors import draw_key_heads


@dataclasses.dataclass(frozen=True)
class FormCode:
    """The code of one attention.

    Attributes:
        mask: Its mask, None where the call is causal by itself.
        lines: The body of ``attend(query, key, value, mask)``, which returns (B, H, S, Dv).
        key_heads: How key and value heads are repeated before the call, with {x} for the tensor; "" is not.
        scale: The factor on the scores.
        softcap: Of the scores; None is none.
        is_causal: Whether the call is causal beside its mask.
    """

    mask: MaskCode | None
    lines: list[str]
    key_heads: str
    scale: float
    softcap: float | None = None
    is_causal: bool = False


def draw_sdpa(scope: Scope) -> FormCode:
    """Return a call of scaled_dot_product_attention."""
    choices, sizes = scope.choices, scope.sizes
    is_square = sizes.start == 0
    has_mask = not is_square or choices.chance(70)
    mask = draw_mask(scope) if has_mask else None
    is_causal = not has_mask or (mask is not None and mask.is_bool and is_square and choices.chance(4))
    function = choices.pick(
        [
            "F.scaled_dot_product_attention",
            "torch.nn.functional.scaled_dot_product_attention",
            "torch.ops.aten.scaled_dot_product_attention",
            "torch.ops.aten.scaled_dot_product_attention.default",
        ]
    )
    scale, scale_text = _draw_scale(scope)
    keywords = [f"scale={scale_text}"] if scale_text else []
    key_heads = draw_key_heads(scope)
    if not key_heads and sizes.heads != sizes.kv_heads:
        keywords.append("enable_gqa=True")
    given = "mask" if has_mask else "None"
    arguments = choices.pick(
        [
            [f"attn_mask={given}", f"is_causal={is_causal}"],
            [f"{given}", "0.0", f"{is_causal}"],
            [f"attn_mask={given}", "dropout_p=0.0", f"is_causal={is_causal}"],
        ]
    )
    call = f"{function}(query, key, value, {', '.join([*arguments, *keywords])})"
    return FormCode(mask, [f"return {call}"], key_heads, scale, is_causal=is_causal)


def _draw_scale(scope: Scope) -> tuple[float, str]:
    """Return a scale, and its code: "" for the default."""
    default = scope.sizes.head_dim**-0.5
    return scope.choices.pick(
        [
            (default, ""),
            (default, ""),
            (default, "query.shape[-1] ** -0.5"),
            (default, "1 / math.sqrt(query.size(-1))"),
            (0.5, "0.5"),
            (1.0, "1"),
        ]
    )


def draw_written_out(scope: Scope) -> FormCode:
    """Return attention of two products and a softmax."""
    choices = scope.choices
    mask = draw_mask(scope)
    key_heads = draw_key_heads(scope)
    if not key_heads and scope.sizes.heads != scope.sizes.kv_heads:
        key_heads = f"{{x}}.repeat_interleave({scope.sizes.heads // scope.sizes.kv_heads}, dim=1)"
    scale, scale_text = _draw_scale(scope)
    scale_text = scale_text or "query.shape[-1] ** -0.5"
    if choices.chance(15):
        return FormCode(mask, _merge_heads(scope, mask, scale_text), key_heads, scale)
    lines = _draw_scores(scope, scale_text)
    softcap = 4.0 if choices.chance(10) else None
    if softcap is not None:
        lines.append(choices.pick(["scores = torch.tanh(scores / 4.0) * 4.0", "scores = 4.0 * (scores / 4.0).tanh()"]))
    lines += [_apply_mask(scope, mask), *_draw_softmax(scope), _draw_output(scope)]
    return FormCode(mask, lines, key_heads, scale, softcap)


def _draw_scores(scope: Scope, scale: str) -> list[str]:
    transposed = scope.choices.pick(
        ["key.transpose(-1, -2)", "key.transpose(2, 3)", "key.mT", "key.permute(0, 1, 3, 2)", "key.transpose(3, 2)"]
    )
    return scope.choices.pick(
        [
            [f"scores = query @ {transposed} * ({scale})"],
            [f"scores = torch.matmul(query, {transposed}) * ({scale})"],
            [f"scores = torch.matmul(query * ({scale}), {transposed})"],
            [f"scores = query @ {transposed}", f"scores = scores / (1 / ({scale}))"],
            [f"scores = torch.matmul(query, {transposed})", f"scores *= {scale}"],
            [f"scores = (query @ {transposed}).div(1 / ({scale}))"],
            [f"scores = torch.matmul(query, {transposed}) * torch.tensor({scale}, dtype=query.dtype)"],
            [f"scores = torch.einsum('bhid,bhjd->bhij', query, key) * ({scale})"],
            [
                f"scores = torch.matmul(query.float(), {transposed}.float()) * ({scale})",
                "scores = scores.to(query.dtype)",
            ],
        ]
    )


def _apply_mask(scope: Scope, mask: MaskCode) -> str:
    if not mask.is_bool:
        return scope.choices.pick(["scores = scores + mask", "scores += mask", "scores = torch.add(scores, mask)"])
    return scope.choices.pick(
        [
            "scores = scores.masked_fill(~mask, -torch.inf)",
            "scores = scores.masked_fill(mask == 0, float('-inf'))",
            "scores = torch.where(mask, scores, torch.finfo(scores.dtype).min)",
            "scores = torch.where(mask, scores, -torch.inf)",
            "scores = scores.masked_fill(mask.logical_not(), torch.finfo(scores.dtype).min)",
            "scores.masked_fill_(~mask, -torch.inf)",
            "scores = scores + torch.where(mask, 0.0, -torch.inf).to(scores.dtype)",
        ]
    )


def _draw_softmax(scope: Scope) -> list[str]:
    shift = scope.choices.pick(
        [
            [],
            [],
            [],
            ["scores = scores - scores.max(dim=-1, keepdim=True).values"],
            ["scores = scores - scores.amax(-1, keepdim=True)"],
        ]
    )
    softmax = scope.choices.pick(
        [
            "weights = torch.softmax(scores, dim=-1)",
            "weights = scores.softmax(-1)",
            "weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)",
            "weights = F.softmax(scores.float(), dim=-1).type_as(query)",
            "weights = torch.nn.Softmax(dim=-1)(scores)",
            "weights = torch.softmax(scores, 3)",
        ]
    )
    dropout = scope.choices.pick([[], [], [], ["weights = F.dropout(weights, 0.1, training=False)"]])
    return [*shift, softmax, *dropout]


def _draw_output(scope: Scope) -> str:
    return scope.choices.pick(
        ["return weights @ value", "return torch.matmul(weights, value)", "return weights.matmul(value)"]
        + ["return torch.einsum('bhij,bhjd->bhid', weights, value)"] * scope.choices.chance(10)
    )


def _merge_heads(scope: Scope, mask: MaskCode, scale: str) -> list[str]:
    """Return attention whose batch and heads are one dimension, as Bloom's and Falcon's."""
    merge = [f"{x} = {x}.reshape(-1, *{x}.shape[2:])" for x in ("query", "key", "value")]
    apply = "scores = scores.masked_fill(~mask, -torch.inf)" if mask.is_bool else "scores = scores + mask"
    product = scope.choices.pick(
        [
            f"scores = torch.bmm(query, key.transpose(1, 2)) * ({scale})",
            f"scores = query.matmul(key.transpose(1, 2)) * ({scale})",
            f"scores = torch.baddbmm(zeros, query, key.transpose(1, 2), beta=1.0, alpha={scale})",
            f"scores = zeros.baddbmm(query, key.mT, beta=1, alpha={scale})",
        ]
    )
    return [
        "batch, heads, length, _ = query.shape",
        *(["zeros = torch.zeros(batch * heads, 1, key.shape[2], dtype=query.dtype)"] if "zeros" in product else []),
        *merge,
        product,
        "scores = scores.view(batch, heads, length, -1)",
        apply,
        "weights = torch.softmax(scores, -1).view(batch * heads, length, -1)",
        "return torch.bmm(weights, value).view(batch, heads, length, -1)",
    ]
