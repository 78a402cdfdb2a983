"""The decorator ``@sparse_prefill``: ``torch.compile`` with the backend "flexprefill", options checked at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar, cast, overload

import torch
from torch import nn

from .settings.config import split_options
from .torch_internals import inductor_option_names

T = TypeVar("T", bound=Callable[..., Any])


@overload
def sparse_prefill(target: T, /) -> T: ...


@overload
def sparse_prefill(
    target: None = None, /, *, dynamic: bool | None = None, fullgraph: bool = False, **options: Any
) -> Callable[[T], T]: ...


def sparse_prefill(
    target: T | None = None, /, *, dynamic: bool | None = None, fullgraph: bool = False, **options: Any
) -> T | Callable[[T], T]:
    """Compile a function, method, nn.Module or class of nn.Module so that its prefill attention runs sparse.

    ``@sparse_prefill`` and ``@sparse_prefill(gamma=0.9)`` both work. Name, docstring and signature stay. A module
    gives a module of the same class that shares its parameters, so ``generate()`` and the like run sparse as well, and
    the one passed in stays as it is. A class gets a compiled ``forward``.

    Args:
        target: What to compile.
        dynamic: As for ``torch.compile``.
        fullgraph: As for ``torch.compile``.
        **options: Fields of SparsePrefillConfig; the others go to inductor.

    Raises:
        InvalidOptionError: An unknown option, or a value out of range.
        TypeError: The target can't be called.
    """
    split_options(options, inductor_option_names())
    settings: dict[str, Any] = {
        "backend": "flexprefill",
        "dynamic": dynamic,
        "fullgraph": fullgraph,
        "options": options,
    }
    if target is None:
        return lambda given: _compile(given, settings)
    return _compile(target, settings)


def _compile(target: T, settings: dict[str, Any]) -> T:
    if isinstance(target, nn.Module):
        module = copy.copy(target)
        module.compile(**settings)
        return module
    if isinstance(target, type) and issubclass(target, nn.Module):
        target.forward = torch.compile(target.forward, **settings)
        return target
    if not callable(target) or isinstance(target, type):
        raise TypeError(f"sparse_prefill compiles a function, an nn.Module or a class of nn.Module, got {target!r}")
    return cast("T", torch.compile(target, **settings))
