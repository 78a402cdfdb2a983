"""What a case should give, in float64, and how far from it rounding may lead."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .grammar.case import Case
from .grammar.flex import FlexCode


@dataclasses.dataclass(frozen=True)
class Attention:
    """One attention of a case in float64.

    Attributes:
        logits: (B, H, S, T), -inf where a query does not see a key.
        value: (B, H, T, Dv).
        visible: (B, H, S, T) bool.
        is_finite: Whether query, key and value are. If not, what is hidden may leak into rows that don't see it, as it
            does from some of eager's kernels: 0 * NaN.
    """

    logits: Tensor
    value: Tensor
    visible: Tensor
    is_finite: bool

    @property
    def has_keys(self) -> Tensor:
        """(B, H, S, 1) bool, the rows that see a key whose score is not -inf."""
        return (self.visible & (self.logits > -torch.inf).logical_or(self.logits.isnan())).any(-1, keepdim=True)

    @property
    def poisoned(self) -> Tensor:
        """(B, H, S, Dv) bool, the numbers that depend on one that isn't finite."""
        bad_scores = (self.visible & (self.logits.isnan() | (self.logits == torch.inf))).any(-1, keepdim=True)
        bad_values = self.visible.double() @ (~self.value.isfinite()).double() > 0
        return bad_scores | bad_values

    def attend(self, computed: Tensor | None = None) -> Tensor:
        """Return (B, H, S, Dv), over the computed pairs alone if they are given."""
        logits = self.logits.nan_to_num(0, posinf=0, neginf=-torch.inf)
        if computed is not None:
            logits = logits.masked_fill(~computed, -torch.inf)
        return logits.softmax(-1).nan_to_num(0) @ self.value.nan_to_num(0, 0, 0)

    def weights(self) -> Tensor:
        """Return (B, H, S, T)."""
        return self.logits.softmax(-1)


def describe(case: Case, names: dict[str, Any], inputs: dict[str, Any], query_factor: float = 1.0) -> Attention:
    """Compute the attention of a case for given inputs, its query multiplied by a factor."""
    others = dict(inputs)
    operand_names = [name for name in ("fused", "query", "key", "value") if name in inputs]
    query, key, value = names["operands"](**{name: others.pop(name) for name in operand_names})
    mask = names["compute_mask"](query, key, **others)
    form = case.form
    if isinstance(form, FlexCode):
        bias = torch.as_tensor(names["compute_bias"](query, key, **others)).double()
    else:
        bias = torch.zeros(())
        if form.key_heads:
            key, value = (eval(form.key_heads.format(x="x"), {"torch": torch, "x": x}) for x in (key, value))
    group = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(group, dim=1) for x in (key, value))
    scores = query_factor * query.double() @ key.mT * form.scale
    if form.softcap is not None:
        scores = torch.tanh(scores / form.softcap) * form.softcap
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool)
    if mask is None or getattr(form, "is_causal", False):
        visible = visible.tril()
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        # The lowest number hides a key, whatever a bias adds to it.
        visible = visible & (mask > torch.finfo(mask.dtype).min / 2)
        bias = mask.double().masked_fill(~visible, 0)
    visible = visible.expand(scores.shape)
    logits = (scores + bias).masked_fill(~visible, -torch.inf)
    is_finite = all(bool(x.isfinite().all()) for x in (query, key, value))
    return Attention(logits, value, visible, is_finite)


def allowed_error(attention: Attention, dtype: torch.dtype, *, has_fast_exponential: bool) -> float:
    """Return how far an output of this dtype may be from the exact one.

    Each of the few operations that make a logit rounds it by half an epsilon of its size, which changes its weight by
    so much; weights, sums and products round a few times more. An output is an average of values.
    """
    epsilon = torch.finfo(dtype).eps
    if has_fast_exponential:  # of inductor's C++ template: 20 bits
        epsilon = max(epsilon, 2.0**-20)
    logits = attention.logits[attention.logits.isfinite()]
    values = attention.value[attention.value.isfinite()]
    largest_logit = float(logits.abs().max()) if logits.numel() else 0.0
    largest_value = float(values.abs().max()) if values.numel() else 0.0
    return epsilon * (4 + 3 * largest_logit) * largest_value
