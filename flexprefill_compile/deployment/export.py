"""``export``: a model as a ``torch.export`` program whose prefill runs sparse.

    model -> torch.export -> SparsePrefillPass -> torch.export again, which traces what the pass inserted

The program is saved and loaded as any other; the process that loads it imports ``flexprefill_compile``, for the
operators that it calls.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from flexprefill_compile.passes.graph.nodes import example_of
from flexprefill_compile.passes.sparse_prefill import SparsePrefillPass

from ..errors import UsageError
from ..report import RewriteReport, check_skips
from ..settings.config import InvalidOptionError, SparsePrefillConfig, split_options
from ..settings.device_defaults import find_device, resolve_min_length, resolve_selection
from ..torch_internals import flex_attention_hop
from ..torch_internals.operators import without_guards_on_sizes
from .selected_attention import from_flex_attention

_REPORT = "flexprefill_report"


def export(
    model: nn.Module,
    /,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    **kwargs: Any,
) -> ExportedProgram:
    """Export a model for inference, with its prefill attention sparse.

    A program has one graph for all lengths that ``dynamic_shapes`` allows. So a call runs sparse only if every one of
    them reaches ``min_length``; else it stays dense.

    Args:
        model: An nn.Module, in the mode in which it will run.
        *args: Its inputs, as examples.
        options: Fields of SparsePrefillConfig.
        dynamic_shapes: As for ``torch.export.export``; None is the shapes of the examples alone.
        **kwargs: Its inputs by name.

    Returns:
        The program; ``export_report`` tells what became of each attention call.

    Raises:
        UsageError: ``model`` is no nn.Module.
        InvalidOptionError: An option that is unknown, out of range or has no meaning here.
        AttentionSkippedError: ``on_skip="raise"`` and a call must stay dense.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"model must be an nn.Module, as for torch.export, got {type(model).__name__}")
    config = _check_options(options)
    with torch.no_grad(), without_guards_on_sizes():
        program = _export(_uncompiled(model), args, kwargs, dynamic_shapes)
        report = _rewrite(program, config, options or {})
        rewritten = _export(program.module(check_guards=False), args, kwargs, dynamic_shapes)
    rewritten.graph_module.meta[_REPORT] = report
    return rewritten


def export_report(program: ExportedProgram) -> RewriteReport:
    """Return what became of each attention call of a program that ``export`` returned; ``str()`` is a table.

    Raises:
        UsageError: It comes from elsewhere. Saved programs don't keep the report.
    """
    report = program.graph_module.meta.get(_REPORT)
    if not isinstance(report, RewriteReport):
        raise UsageError("this program has no report: it was not made by flexprefill_compile.export, or was loaded")
    return report


def _check_options(options: Mapping[str, Any] | None) -> SparsePrefillConfig:
    """Check the options of an export; FlexAttention's kernel is Triton's.

    Raises:
        InvalidOptionError: One is unknown, out of range or has no meaning here.
    """
    config, _ = split_options(options, frozenset())
    if config.max_density is not None and config.max_density < 1:
        raise InvalidOptionError("max_density must be None or 1 in an exported program: it has no dense branch")
    if config.sequence_parallel is not None:
        raise InvalidOptionError("sequence_parallel can't be exported: compile the model on each rank instead")
    if config.kernel_backend == "flash":
        raise InvalidOptionError('kernel_backend "flash" can\'t be exported: AOTInductor does not package its kernels')
    return dataclasses.replace(config, kernel_backend="triton")


def _uncompiled(model: nn.Module) -> nn.Module:
    """Return a model without the compilation that it may have had."""
    model = getattr(model, "_orig_mod", model)
    if getattr(model, "_compiled_call_impl", None) is None:
        return model
    model = copy.copy(model)
    model._compiled_call_impl = None
    return model


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> ExportedProgram:
    return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)


def _rewrite(program: ExportedProgram, config: SparsePrefillConfig, options: Mapping[str, Any]) -> RewriteReport:
    """Run the pass over a program in place."""
    module: GraphModule = program.graph_module
    examples = [x for node in module.graph.find_nodes(op="placeholder") if isinstance(x := example_of(node), Tensor)]
    config = resolve_selection(config, options, find_device(examples))
    config = resolve_min_length(config, examples)
    own_calls = set(module.graph.find_nodes(op="call_function", target=flex_attention_hop))
    sparse_prefill = SparsePrefillPass(config, {})
    sparse_prefill(module)
    if config.on_skip == "raise":
        check_skips(sparse_prefill.sites)
    for call in module.graph.find_nodes(op="call_function", target=flex_attention_hop):
        if call not in own_calls:
            from_flex_attention(call)
    module.recompile()
    return RewriteReport(tuple(sparse_prefill.sites))
