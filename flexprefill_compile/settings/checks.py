"""How options are checked: one sentence says what a value must be and what it is."""

from __future__ import annotations

from typing import Any

from ..torch_internals import PassesThroughDynamo


class InvalidOptionError(PassesThroughDynamo, ValueError):
    """An option has an unknown name or a value out of range."""


def check(name: str, value: object, expected: str, is_valid: bool) -> None:
    """Raise unless a value is what it must be.

    Raises:
        InvalidOptionError: "name must be expected, got value".
    """
    if not is_valid:
        raise InvalidOptionError(f"{name} must be {expected}, got {value!r}")


def is_number(value: object) -> bool:
    """Tell whether a value is a number, not True or False."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_integer(value: object, at_least: int) -> bool:
    """Tell whether a value is a whole number from ``at_least`` on, not True or False."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def resolve_gamma(gamma: Any) -> Any:
    """Check one share, or one for each query head, which may come as a list; return it in a form that hashes.

    Raises:
        InvalidOptionError: A share is out of range, or there is none.
    """
    if not isinstance(gamma, list | tuple):
        check("gamma", gamma, "in (0, 1]", is_number(gamma) and 0 < gamma <= 1)
        return gamma
    are_shares = len(gamma) > 0 and all(is_number(share) and 0 < share <= 1 for share in gamma)
    check("gamma", gamma, "in (0, 1], one number or one for each query head", are_shares)
    return tuple(gamma)


def check_tau(tau: object) -> None:
    """Check a distance.

    Raises:
        InvalidOptionError: It is out of range.
    """
    check("tau", tau, "in [0, 1]", isinstance(tau, int | float) and is_number(tau) and 0 <= tau <= 1)


def check_budgets(min_budget: Any, max_budget: Any) -> None:
    """Check a floor and a ceiling in tokens; either may be None.

    Raises:
        InvalidOptionError: One is out of range, or the ceiling is below the floor.
    """
    if min_budget is not None:
        check("min_budget", min_budget, "a number of tokens, at least 0", is_integer(min_budget, 0))
    if max_budget is not None:
        least = min_budget or 0
        expected = f"None or a number of tokens, at least min_budget ({least})"
        check("max_budget", max_budget, expected, is_integer(max_budget, max(1, least)))
