"""``explain``: what becomes of each attention call of a model, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .backend import FlexPrefillBackend
from .parallel.prompt import is_first_rank
from .report import RewriteReport
from .settings.config import split_options
from .torch_internals import inductor_option_names, uncompiled_call


def explain(
    model: Callable[..., Any], /, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> RewriteReport:
    """Compile and run a model once; print and return what became of each of its attention calls.

    The model is really compiled, as ``torch.compile`` does with the same options and in the same grad mode, so what the
    report says is what runs, lowering included; inductor's caches make the next compile of the model short.
    Over several ranks every rank calls it, and the first one prints; the sizes are those of its own heads.

    Args:
        model: A function or nn.Module.
        *args: Its inputs.
        options: As for ``torch.compile``.
        **kwargs: Its inputs by name.

    Returns:
        The report, one site an attention call, in the order of the graphs; ``str()`` is the table printed.

    Raises:
        InvalidOptionError: An unknown option, or a value out of range.
    """
    split_options(options, inductor_option_names())  # dict() takes more than mappings
    backend = FlexPrefillBackend()
    torch.compile(uncompiled_call(model), backend=backend, options=dict(options or {}))(*args, **kwargs)
    if is_first_rank():
        print(backend.report)
    return backend.report
