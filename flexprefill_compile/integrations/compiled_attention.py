"""One attention call as a graph of its own, compiled by the backend: every law of the backend holds for it.

    attend(query, key, value, mask)  ->  torch.compile(..., backend=FlexPrefillBackend())  ->  sparse, or the reason

Calls of one kind share a compiled function: equal settings, shapes but for lengths, and mask formulas. A kind that must
stay dense is remembered with its reason and not compiled again.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor

from ..backend import FlexPrefillBackend
from ..report import AttentionSkippedError, SkipReason
from ..settings.config import SparsePrefillConfig
from ..torch_internals import CAPTURE_ERRORS, copy_function, without_recompile_limit

logger = logging.getLogger(__name__)

# Why an attention stays dense, and the value that decided.
Refusal = tuple[SkipReason, str]


@dataclasses.dataclass
class _Kind:
    """The calls that one compiled function serves.

    Attributes:
        compiled: The function.
        backend: Of the function.
        refusal: Why they stay dense, once it is known that they must.
    """

    compiled: Callable[..., Tensor]
    backend: FlexPrefillBackend
    refusal: Refusal | None = None


class CompiledAttention:
    """Attention functions compiled so far, by kind."""

    def __init__(self) -> None:
        self._kinds: dict[object, _Kind] = {}

    def clear(self) -> None:
        """Forget every function and refusal."""
        self._kinds.clear()

    def __call__(
        self,
        attend: Callable[..., Tensor],
        inputs: tuple[Any, ...],
        kind: object,
        config: SparsePrefillConfig,
        inductor_options: Mapping[str, Any],
    ) -> Tensor | Refusal:
        """Attend sparsely, or tell why this kind of attention stays dense.

        Args:
            attend: One attention call in plain torch code.
            inputs: Its arguments, query, key and value first.
            kind: What tells kinds apart beside the settings and the tensors: hashable.
            config: The settings of the layer; its ``min_length`` was checked.
            inductor_options: Options of inductor.
        """
        others = tuple(sorted(map(repr, inductor_options.items())))
        identity = (attend, kind, config, others, *map(_describe, inputs[:3]))
        if identity not in self._kinds:
            options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
            options |= {**inductor_options, "on_skip": "raise"}
            own, backend = copy_function(attend), FlexPrefillBackend()
            compiled = torch.compile(own, backend=backend, fullgraph=True, options=options)
            self._kinds[identity] = _Kind(compiled, backend)
        entry = self._kinds[identity]
        if entry.refusal is not None:
            return entry.refusal
        output = _run(entry, inputs)
        if entry.refusal is not None:
            logger.warning("attention stays dense: %s: %s", entry.refusal[0].value, entry.refusal[1] or "no detail")
            return entry.refusal
        assert output is not None
        return output


def _run(entry: _Kind, inputs: tuple[Any, ...]) -> Tensor | None:
    """Attend, or note why the attention stays dense."""
    try:
        with without_recompile_limit():
            output = entry.compiled(*inputs)
    except AttentionSkippedError as error:
        entry.refusal = (error.site.reason, error.site.detail)
    except CAPTURE_ERRORS as error:
        entry.refusal = (SkipReason.UNRECOGNISED, f"dynamo: {str(error).splitlines()[0]}"[:200])
    else:
        if entry.backend.report.num_rewritten:
            return output
        entry.refusal = (SkipReason.UNRECOGNISED, "")
    return None


def _describe(x: Tensor) -> object:
    """Return what about a (B, H, S, D) tensor has a compiled function of its own: all but lengths and batch."""
    return x.dtype, x.device, x.dim(), tuple(x.shape[1::2])


def describe_formula(function: object) -> object:
    """Return what tells mask functions apart: their code and what they close over, but for the elements of tensors."""
    if isinstance(function, FunctionType):
        code: CodeType = function.__code__
        cells = tuple(describe_formula(cell.cell_contents) for cell in function.__closure__ or ())
        return code, cells
    if isinstance(function, tuple | list):
        return tuple(map(describe_formula, function))
    if isinstance(function, Tensor):
        return function.dtype, function.dim()
    return function if isinstance(function, int | float | str | None) else type(function)
