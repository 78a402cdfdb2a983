"""The grammar of masks: what SDPA takes as attn_mask, or what a model adds to its scores."""

from __future__ import annotations

import dataclasses

from .conditions import draw_condition
from .positions import draw_pair
from .scope import Scope


@dataclasses.dataclass(frozen=True)
class MaskCode:
    """The code of a mask.

    Attributes:
        lines: The body of ``compute_mask(query, key, ...)``.
        is_bool: Whether it is boolean, True where a query sees a key; else it is added to the scores.
    """

    lines: list[str]
    is_bool: bool


def draw_mask(scope: Scope) -> MaskCode:
    """Return a mask that broadcasts to (B, H, S, T)."""
    choices = scope.choices
    if choices.chance(5):
        return _draw_given(scope)
    i, j = draw_pair(scope)
    lines = [f"i = {i}", f"j = {j}", f"mask = {draw_condition(scope)}"]
    if choices.chance(10):
        heads = "mask.shape[-3] if mask.dim() > 2 else 1"
        lines.append(choices.pick([f"mask = mask.expand(query.shape[0], {heads}, -1, -1)", "mask = mask.clone()"]))
    if choices.chance(5):
        lines += _edit_in_place(scope)
    if choices.chance(60):
        return MaskCode([*lines, "return mask"], is_bool=True)
    lines.append(f"mask = {_draw_additive(scope)}")
    if choices.chance(30):
        lines.append(f"mask = mask + {_draw_bias(scope)}")
    return MaskCode([*lines, "return mask.to(query.dtype)"], is_bool=False)


def _draw_given(scope: Scope) -> MaskCode:
    """Return a mask that exists already, whole."""
    batch = scope.sizes.batch
    causal = f"torch.ones(S, T, dtype=torch.bool).tril({scope.sizes.start})"
    source = scope.choices.pick(
        [
            f"{causal}.expand({batch}, 1, -1, -1).clone()",
            f"{causal} & (torch.rand({batch}, 1, S, T) < 0.8)",
            f"torch.rand({batch}, 1, S, T) < 0.8",
        ]
    )
    scope.says_positions = "tril" in source
    mask = scope.read("whole", source, is_batched=True)
    if scope.choices.chance(40):
        return MaskCode([f"return torch.where({mask}, 0.0, -torch.inf).to(query.dtype)"], is_bool=False)
    return MaskCode([f"return {mask}"], is_bool=True)


def _edit_in_place(scope: Scope) -> list[str]:
    edits = ["mask &= j >= 2", "mask[..., :2] = True", "mask[..., 3] = False", "mask.masked_fill_(j > i, False)"]
    return ["mask = mask.clone()", scope.choices.pick([*edits, "mask.logical_and_(j % 5 != 2)"])]


def _draw_additive(scope: Scope) -> str:
    """Return numbers to add to the scores for a condition ``mask``."""
    dtype = f"torch.{scope.dtype}"
    lowest = scope.choices.pick(
        ["-torch.inf", "float('-inf')", f"torch.finfo({dtype}).min", "torch.finfo(query.dtype).min"]
    )
    square = f"(query.shape[2], key.shape[2]), {lowest}"
    return scope.choices.pick(
        [
            f"torch.where(mask, 0.0, {lowest})",
            f"torch.zeros_like(mask, dtype={dtype}).masked_fill(~mask, {lowest})",
            f"torch.full({square}, dtype={dtype}).masked_fill(mask, 0)",
            f"torch.zeros(query.shape[2], key.shape[2], dtype={dtype}).masked_fill(mask.logical_not(), {lowest})",
            f"(1.0 - mask.to({dtype})) * torch.finfo({dtype}).min",
            f"torch.where(mask, torch.tensor(0.0, dtype={dtype}), {lowest})",
            f"torch.zeros(mask.shape, dtype={dtype}).masked_fill_(~mask, {lowest})",
            f"(~mask).to({dtype}).masked_fill(~mask, {lowest})",
            f"torch.where(mask, 0.0, -1e9 if {dtype} != torch.float16 else -6e4)",
            "mask.float().log()",
        ]
    )


def _draw_bias(scope: Scope) -> str:
    heads = scope.sizes.heads
    bias = scope.choices.pick(
        [
            "slopes[:, None, None] * (j - i)",
            "slopes.view(1, -1, 1, 1) * (j - i)",
            "-(i - j).abs() * slopes[:, None, None]",
            "table[(i - j).long().clamp(0, 31)].squeeze(0).squeeze(0).permute(2, 0, 1)",
            "slopes[:, None, None] * j",
            "0.5",
            "key_bias[:, None, None, :]",
        ]
    )
    scope.read("slopes", f"2.0 ** -torch.arange(3, {heads} + 3)")
    if "table" in bias:
        scope.read("table", f"torch.randn(32, {heads})")
    if "key_bias" in bias:
        scope.read("key_bias", f"torch.randn({scope.sizes.batch}, T)", is_batched=True)
    return bias
