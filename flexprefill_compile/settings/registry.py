"""Estimators by name: those built in, and functions that users register.

``block_masks/estimators/table.py`` registers those built in when the package is imported. A user's function takes
``block_masks.estimators.inputs.EstimatorInputs`` and returns block scores; docs/estimators.md states the contract.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .checks import InvalidOptionError, check

Estimator = Callable[[Any], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuiltIn:
    """What the settings know of a built-in estimator.

    Attributes:
        name: What ``SparsePrefillConfig.estimator`` calls it.
        is_dense: Whether it keeps every block, whatever the inputs.
        gamma: Its default.
        min_budget: Its default, in tokens; None follows the length of the context.
        cpu_gamma: Its default on a CPU.
        gpu_block_size: Its default on a GPU by FlexAttention's Triton template, in tokens; 128 elsewhere.
    """

    name: str
    is_dense: bool = False
    gamma: float = 0.95
    min_budget: int | None = 1024
    cpu_gamma: float = 0.95
    gpu_block_size: int = 128


BUILT_IN: dict[str, BuiltIn] = {}
_registered: dict[str, Estimator] = {}


def register_built_in(estimator: BuiltIn) -> None:
    """Make the name of a built-in estimator known; the order of these calls is that of the names in messages."""
    BUILT_IN[estimator.name] = estimator


def find_defaults(name: object) -> BuiltIn:
    """Return what the settings know of an estimator; a user's function has the defaults of ``BuiltIn``."""
    return BUILT_IN.get(str(name), BuiltIn(name=str(name)))


def register_estimator(name: str, function: Estimator) -> None:
    """Make ``estimator=name`` choose blocks by a function of one's own.

    Args:
        name: What to call it.
        function: Takes ``EstimatorInputs``, returns block scores, (B, H, num_q_blocks, num_k_blocks): not negative, the
            mass that each query block's attention has on each key block, in any unit.

    Raises:
        InvalidOptionError: The name is taken by another function, or the function can't be called.
    """
    check("an estimator's name", name, "a text", isinstance(name, str) and name != "")
    check(f"estimator {name!r}", function, "a function of EstimatorInputs", callable(function))
    if name in BUILT_IN or _registered.get(name, function) is not function:
        raise InvalidOptionError(f"an estimator {name!r} exists already: choose another name")
    _registered[name] = function


def name_estimator(function: Estimator) -> str:
    """Return the name of a function, registered under its module and qualified name if it has none yet.

    Compiled graphs, and the caches of graphs, hold this name: it is the same in every process that defines the same
    functions in the same order.
    """
    for name, registered in _registered.items():
        if registered is function:
            return name
    module, own = getattr(function, "__module__", ""), getattr(function, "__qualname__", type(function).__qualname__)
    base = name = f"{module}.{own}"
    number = 1
    while name in _registered:
        number += 1
        name = f"{base}#{number}"
    register_estimator(name, function)
    return name


def find_estimator(name: str) -> Estimator:
    """Return the function that a user registered under a name.

    Raises:
        InvalidOptionError: There is none.
    """
    check_estimator(name)
    return _registered[name]


def check_estimator(name: object) -> None:
    """Check that a name is that of an estimator.

    Raises:
        InvalidOptionError: It is not; the names that are follow.
    """
    names = (*BUILT_IN, *_registered)
    check("estimator", name, f"one of {', '.join(names)}", isinstance(name, str) and name in names)
