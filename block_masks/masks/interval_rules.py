"""Interval arithmetic for the aten ops of mask functions: what an op gives, from the ends of what it is given.

An interval holds every value that a block of token pairs takes. For booleans that is three-valued logic: ``lower`` is
"certainly true" and ``upper`` "possibly true". The rules hold for every value of a dtype:

- Ends go through the same op as the elements, so they are rounded alike and stay in order.
- A NaN among the values makes both ends NaN. "Possibly" is written as the negation of "certainly not", so a comparison
  with NaN ends is not certain but possible: neither claim is made.
- Integers that wrap around are the full range of their dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

aten = torch.ops.aten
_Op = Any  # an OpOverload or its packet


class Interval(NamedTuple):
    """The least and the greatest value in each block; tensors that broadcast, or one scalar twice."""

    lower: Any
    upper: Any


def apply_rule(op: _Op, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Interval:
    """Return the values of an elementwise op over blocks.

    Args:
        op: An aten overload; one without a rule gives an interval that holds everything.
        arguments: Its arguments, operands as intervals.
        keywords: Its keyword arguments.
    """
    rule = _RULES.get(getattr(op, "overloadpacket", op))
    if rule is None or any(isinstance(x, Interval | Tensor) for x in keywords.values()):
        return _unknown(op, *arguments, **keywords)
    return rule(op, *arguments, **keywords)


def is_true(x: Interval) -> Interval:
    """Return three-valued booleans: where numbers aren't zero."""
    return x if x.lower.dtype == torch.bool else _not_equal(aten.ne, x, Interval(0, 0))


def _hold_everything(dtype: torch.dtype, device: torch.device) -> Interval:
    """Return the interval, of one element, that says nothing about values of a dtype."""
    if dtype == torch.bool:
        ends: tuple[float, float] = (False, True)
    elif dtype.is_floating_point:
        ends = (torch.nan, torch.nan)  # infinite ends would say that there is no NaN
    else:
        ends = (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return Interval(*(torch.full((1,) * 6, end, dtype=dtype, device=device) for end in ends))


def _unknown(op: _Op, *arguments: Any, **keywords: Any) -> Interval:
    """Run the op on ones, which are safe to divide by, for the dtype that it gives."""

    def sample(x: Any) -> Any:
        end = x.lower if isinstance(x, Interval) else x
        return end.new_ones((1,) * end.dim()) if isinstance(end, Tensor) else end

    ones = pytree.tree_map(sample, (arguments, keywords), is_leaf=lambda x: isinstance(x, Interval))
    result = op(*ones[0], **ones[1])
    return _hold_everything(result.dtype, result.device)


def _increasing(op: _Op, *operands: Any, **keywords: Any) -> Interval:
    """Ops that grow with each of their operands."""
    ends = [x if isinstance(x, Interval) else Interval(x, x) for x in operands]
    return Interval(op(*(x.lower for x in ends), **keywords), op(*(x.upper for x in ends), **keywords))


def _extremes(op: _Op, *operands: Interval, **keywords: Any) -> Interval:
    """Ops that grow or fall with each operand on either side of zero: the extremes lie at ends or at zeros."""
    results, overflows = [], []
    for corner in itertools.product(*map(_corners, operands)):
        result = op(*corner, **keywords)
        results.append(result)
        if not result.is_floating_point() and result.dtype != torch.bool:
            exact = op(*(x.double() if isinstance(x, Tensor) else x for x in corner), **keywords)
            # A wrapped result is a multiple of the dtype's range away; float64 rounds by far less.
            overflows.append((exact - result.double()).abs() > torch.iinfo(result.dtype).max)
    interval = Interval(reduce(torch.minimum, results), reduce(torch.maximum, results))
    if not overflows:
        return interval
    anything = _hold_everything(interval.lower.dtype, interval.lower.device)
    return Interval(
        *(torch.where(reduce(torch.logical_or, overflows), *x) for x in zip(anything, interval, strict=True))
    )


def _corners(x: Interval) -> list[Any]:
    if not isinstance(x.lower, Tensor) or x.lower is x.upper:
        return [x.lower]
    if x.lower.dtype == torch.bool:
        return [x.lower, x.upper]
    return [x.lower, torch.minimum(x.lower.clamp(min=0), x.upper), x.upper]


def _divide(op: _Op, dividend: Interval, divisor: Interval, **keywords: Any) -> Interval:
    rounds = keywords.get("rounding_mode") is not None or op.overloadpacket is aten.floor_divide
    is_float = dividend.lower.is_floating_point() or isinstance(divisor.lower, float)
    # Rounded division of floats is computed from a remainder, with its own rounding.
    if not _is_positive(divisor) or (rounds and is_float):
        return _unknown(op, dividend, divisor, **keywords)
    return _increasing(op, dividend, divisor, **keywords)


def _remainder(op: _Op, dividend: Interval, divisor: Interval) -> Interval:
    """Of integers: its own ends where the block lies within one period, any remainder otherwise."""
    period = divisor.lower
    if not _is_positive(divisor) or isinstance(period, float) or dividend.lower.is_floating_point():
        return _unknown(op, dividend, divisor)
    one_period = dividend.lower.floor_divide(period) == dividend.upper.floor_divide(period)
    lower, upper = _increasing(op, dividend, divisor)
    return Interval(torch.where(one_period, lower, 0), torch.where(one_period, upper, period - 1))


def _is_positive(x: Interval) -> bool:
    return isinstance(x.lower, (int, float)) and x.lower > 0


_OPPOSITES: dict[Any, Any] = {aten.lt: aten.ge, aten.le: aten.gt, aten.gt: aten.le, aten.ge: aten.lt}


def _compare(op: _Op, left: Interval, right: Interval) -> Interval:
    packet: Any = getattr(op, "overloadpacket", op)
    worst, best = (left.upper, right.lower), (left.lower, right.upper)
    if packet in (aten.gt, aten.ge):
        worst, best = (left.lower, right.upper), (left.upper, right.lower)
    return Interval(packet(*worst), ~_OPPOSITES[packet](*best))


def _equal(op: _Op, left: Interval, right: Interval) -> Interval:
    return _and(op, _compare(aten.le, left, right), _compare(aten.ge, left, right))


def _not_equal(op: _Op, left: Interval, right: Interval) -> Interval:
    return _not(op, _equal(op, left, right))


def _not(op: _Op, x: Interval) -> Interval:
    return Interval(~x.upper, ~x.lower)


def _and(op: _Op, left: Interval, right: Interval) -> Interval:
    return Interval(left.lower & right.lower, left.upper & right.upper)


def _or(op: _Op, left: Interval, right: Interval) -> Interval:
    return Interval(left.lower | right.lower, left.upper | right.upper)


def _logical(rule: Callable[..., Interval]) -> Callable[..., Interval]:
    return lambda op, *operands: rule(op, *map(is_true, operands))


def _bitwise(rule: Callable[..., Interval]) -> Callable[..., Interval]:
    def apply(op: _Op, *operands: Interval) -> Interval:
        is_bool = all(isinstance(x.lower, Tensor) and x.lower.dtype == torch.bool for x in operands)
        return rule(op, *operands) if is_bool else _unknown(op, *operands)

    return apply


def _where(op: _Op, condition: Interval, left: Interval, right: Interval) -> Interval:
    """Whichever side the condition may choose: both where it is uncertain."""
    lowers = [op(chosen, left.lower, right.lower) for chosen in condition]
    uppers = [op(chosen, left.upper, right.upper) for chosen in condition]
    return Interval(torch.minimum(*lowers), torch.maximum(*uppers))


def _convert(op: _Op, x: Interval, *, dtype: torch.dtype | None = None, **keywords: Any) -> Interval:
    """Keep the order, unless the dtype can't hold the values."""
    source = x.lower.dtype
    if dtype == torch.bool:
        return is_true(x)
    if dtype is not None and not dtype.is_floating_point and source not in (dtype, torch.bool):
        if source.is_floating_point:
            return _hold_everything(dtype, x.lower.device)
        values, room = torch.iinfo(source), torch.iinfo(dtype)
        if values.min < room.min or values.max > room.max:
            return _hold_everything(dtype, x.lower.device)
    return _increasing(op, x, dtype=dtype, **keywords)


def _gather(op: _Op, table: Interval, indices: list[Any]) -> Interval:
    """Any element of the table."""
    least, greatest = table.lower.amin(), table.upper.amax()
    return Interval(least.reshape((1,) * 6), greatest.reshape((1,) * 6))


_RULES: dict[Any, Callable[..., Interval]] = {
    **dict.fromkeys((aten.add, aten.sub, aten.rsub, aten.mul, aten.neg, aten.abs), _extremes),
    **dict.fromkeys((aten.minimum, aten.maximum, aten.clamp, aten.clamp_min, aten.clamp_max), _increasing),
    **dict.fromkeys((aten.floor, aten.ceil, aten.trunc, aten.clone, aten.alias, aten.detach), _increasing),
    **dict.fromkeys((aten.div, aten.floor_divide), _divide),
    aten.remainder: _remainder,
    **dict.fromkeys((aten.lt, aten.le, aten.gt, aten.ge), _compare),
    aten.eq: _equal,
    aten.ne: _not_equal,
    aten.logical_not: _logical(_not),
    aten.logical_and: _logical(_and),
    aten.logical_or: _logical(_or),
    aten.logical_xor: _logical(_not_equal),
    aten.bitwise_not: _bitwise(_not),
    aten.bitwise_and: _bitwise(_and),
    aten.bitwise_or: _bitwise(_or),
    aten.bitwise_xor: _bitwise(_not_equal),
    aten.where: _where,
    aten._to_copy: _convert,
    aten.index: _gather,
}
