"""``explain``: what becomes of each attention call of a model, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .backend import FlexPrefillBackend
from .parallel.prompt import is_first_rank
from .report import RewriteReport
from .settings.config import split_options
from .torch_internals import compile_settings, inductor_option_names, uncompiled_call, without_recompile_limit


def explain(
    model: Callable[..., Any],
    /,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    autograd: bool = False,
    **kwargs: Any,
) -> RewriteReport:
    """Compile and run a model once; print and return what became of each of its attention calls.

    The model is really compiled, as ``torch.compile`` does with the same options, so the report tells what runs,
    lowering included. Inductor's caches make the next compile of the model short.
    Over several ranks every rank calls it, and the first one prints; the sizes are those of its own heads.

    Args:
        model: A function or nn.Module.
        *args: Its inputs.
        options: As for ``torch.compile``; None is what the model was compiled or decorated with, or else the defaults.
        autograd: Whether to look at the model as it trains; by default it runs under ``torch.no_grad()``.
        **kwargs: Its inputs by name.

    Returns:
        The report, one site an attention call, in the order of the graphs; ``str()`` is the table printed.

    Raises:
        InvalidOptionError: An unknown option, or a value out of range.
    """
    report = report_calls(model, args, kwargs, options, autograd=autograd)
    if is_first_rank():
        print(report)
    return report


def report_calls(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any] | None,
    *,
    autograd: bool = False,
) -> RewriteReport:
    """Do what ``explain`` does, without printing."""
    split_options(options, inductor_option_names())  # dict() takes more than mappings
    backend = FlexPrefillBackend(warns=False)
    settings = compile_settings(model, backend.__name__) if options is None else {"options": dict(options)}
    with torch.set_grad_enabled(autograd), without_recompile_limit():
        torch.compile(uncompiled_call(model), backend=backend, **settings)(*args, **kwargs)
    return backend.report
