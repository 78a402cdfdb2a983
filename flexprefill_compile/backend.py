"""The backend "flexprefill": run the pass over a dynamo graph, hand the graph to inductor, keep the report.

What ``torch.compile(model, backend="flexprefill", options={"gamma": 0.9})`` does with each graph that dynamo captures:

    dynamo graph -> SparsePrefillPass -> inductor -> compiled graph
                          |                  |
                    RewriteReport       failed: that kind of site goes back to dense
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch.fx import GraphModule

from flexprefill_compile.passes.parallel.sequence_parallel import SequenceParallelPass
from flexprefill_compile.passes.rewrite.cpu_workarounds import repaired_cpu_template
from flexprefill_compile.passes.sparse_prefill import SparsePrefillPass, find_signatures

from .parallel.agreement import agree_first
from .report import RewriteReport, Site, SkipReason, check_skips
from .settings.config import DensityCeiling, InvalidOptionError, SparsePrefillConfig, split_options
from .settings.device_defaults import (
    find_device,
    is_flash_available,
    resolve_ceiling,
    resolve_min_length,
    resolve_selection,
)
from .torch_internals import (
    CONTROL_FLOW,
    compile_with_inductor,
    has_cuda_graphs,
    inductor_option_names,
    list_mode_options,
)
from .torch_internals.snapshot import GraphSnapshot

logger = logging.getLogger(__name__)
CompiledGraph = Callable[..., Any]


class FlexPrefillBackend:
    """A backend for ``torch.compile`` that runs prefill attention sparse.

    Attributes:
        report: Every attention call that this backend compiled, until ``torch.compiler.reset()``.
    """

    __name__ = "flexprefill"

    def __init__(self, observed_rows: int = 0, *, warns: bool = True) -> None:
        """Prepare an empty report.

        Args:
            observed_rows: How many query rows of each rewritten attention ``observe_attention`` sees; 0 observes none.
            warns: Whether to warn, once, of attention that stays dense because it runs under autograd.
        """
        self.report = RewriteReport()
        self.observed_rows, self.warns = observed_rows, warns

    def __call__(
        self,
        graph_module: GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> CompiledGraph:
        """Compile a dynamo graph.

        Args:
            graph_module: What dynamo captured.
            example_inputs: Its inputs, as fake tensors and symbols.
            mode: As for inductor.
            options: Fields of SparsePrefillConfig; the others go to inductor.

        Raises:
            InvalidOptionError: An unknown option or mode, or a value out of range.
            AttentionSkippedError: ``on_skip="raise"`` and a call must stay dense.
            SequenceParallelError: ``sequence_parallel`` and something would come out wrong.
        """
        config, config_patches = split_options(options, inductor_option_names())
        config = resolve_selection(config, options or {}, find_device(example_inputs))
        config = resolve_min_length(config, example_inputs)
        config_patches = _mode_patches(mode) | config_patches
        ceiling = resolve_ceiling(config, example_inputs, has_cuda_graphs=has_cuda_graphs(config_patches))
        spread = _spread_over_ranks(graph_module, config)
        compiled, sites = compile_graph(
            graph_module, example_inputs, config, config_patches, ceiling, self.observed_rows
        )
        self.report = RewriteReport(self.report.sites + tuple(sites))
        if self.warns and any(site.reason is SkipReason.GRADIENT for site in sites):
            self.warns = False
            warnings.warn("attention stays dense under autograd: call the model under torch.no_grad()", stacklevel=2)
        if spread is not None and spread.calls:
            return agree_first(compiled, spread.group, config, spread.calls, spread.length, example_inputs, spread.past)
        return compiled

    def reset(self) -> None:
        """Forget the report; dynamo calls this when its own caches are reset."""
        self.report = RewriteReport()


flexprefill = FlexPrefillBackend()


def _spread_over_ranks(graph_module: GraphModule, config: SparsePrefillConfig) -> SequenceParallelPass | None:
    """Run the pass of ``sequence_parallel`` where it is asked for, over more than one rank; return it.

    Raises:
        SequenceParallelError: Something of the graph would come out wrong.
    """
    group = config.sequence_parallel
    if group is None or group.size == 1:
        return None
    spread = SequenceParallelPass(config, group)
    spread(graph_module)
    return spread


def _mode_patches(mode: str | None) -> dict[str, Any]:
    """Return the inductor options that a ``mode`` of ``torch.compile`` stands for.

    Raises:
        InvalidOptionError: Inductor has no such mode.
    """
    modes: dict[str, dict[str, Any]] = list_mode_options()
    if (mode or "default") not in modes:
        raise InvalidOptionError(f"mode must be one of {', '.join(modes)}, got {mode!r}")
    return modes[mode or "default"]


def compile_graph(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    config: SparsePrefillConfig,
    config_patches: dict[str, Any],
    ceiling: DensityCeiling | None = None,
    observed_rows: int = 0,
) -> tuple[CompiledGraph, list[Site]]:
    """Rewrite a graph and compile it; attention that inductor fails on in its sparse form is left dense.

    A ceiling on density and kernels that were chosen for the user are given up first.

    Returns:
        The compiled graph, and what became of each of its attention calls.
    """
    snapshot = GraphSnapshot(graph_module)

    def attempt(failures: Mapping[object, str], *, is_trial: bool = False) -> tuple[CompiledGraph, list[Site]]:
        if failures:  # not the first attempt
            snapshot.restore()
        sparse_prefill = SparsePrefillPass(config, failures, ceiling, observed_rows)
        sparse_prefill(graph_module)
        if config.on_skip == "raise" and not is_trial:
            check_skips(sparse_prefill.sites)
        with repaired_cpu_template():
            return compile_with_inductor(graph_module, example_inputs, config_patches), sparse_prefill.sites

    try:
        return attempt({})
    except CONTROL_FLOW:
        raise
    except Exception as error:
        snapshot.restore()
        may_use_flash = config.kernel_backend == "auto" and is_flash_available()
        if ceiling is not None or may_use_flash:
            logger.warning("tried again without a ceiling on density and without flash-attn-4: %s", _summarise(error))
            backend = "triton" if may_use_flash else config.kernel_backend
            safer = dataclasses.replace(config, kernel_backend=backend)
            return compile_graph(graph_module, example_inputs, safer, config_patches)
        signatures = find_signatures(graph_module, config)
        if not signatures:
            raise
        failures = _find_failures(partial(attempt, is_trial=True), signatures, error)
    for signature, message in failures.items():
        logger.warning("attention stays dense: %s failed to lower: %s", signature, message)
    return attempt(failures)


def _find_failures(
    attempt: Callable[[Mapping[object, str]], object], signatures: Sequence[object], error: Exception
) -> dict[object, str]:
    """Find out which kinds of sites a failed compile is to blame on, by compiling with one kind sparse at a time.

    Args:
        attempt: Compiles the graph with the given signatures dense; raises if it fails.
        signatures: The distinct signatures of the graph's sites.
        error: What the compile with all of them sparse raised.

    Returns:
        The signatures to leave dense, each with its error. All of them, if they only fail together.
    """
    failures: dict[object, str] = {}
    if len(signatures) > 1:
        for signature in signatures:
            try:
                attempt({other: "" for other in signatures if other != signature})
            except CONTROL_FLOW:
                raise
            except Exception as own_error:
                failures[signature] = _summarise(own_error)
    return failures or dict.fromkeys(signatures, _summarise(error))


def _summarise(error: Exception) -> str:
    first_line = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first_line.strip()}"[:200]
