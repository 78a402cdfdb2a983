"""Prefill a causal language model, dense or sparse, for its logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from flexprefill_compile.block_masks import record_densities

from ..backend import FlexPrefillBackend
from ..errors import UsageError
from ..report import RewriteReport
from ..torch_internals import uncompiled_call, without_recompile_limit

Model = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a causal language model is given.

    Attributes:
        args: Its inputs.
        kwargs: Its inputs by name.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def tokens(self) -> Tensor:
        """(B, S) int64: ``input_ids``, or else the first input.

        Raises:
            UsageError: There is none.
        """
        tokens = self.kwargs.get("input_ids", self.args[0] if self.args else None)
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
            raise UsageError("the model's first input, or input_ids, must be a (batch, length) tensor of token numbers")
        return tokens

    @property
    def is_counted(self) -> Tensor | None:
        """(B, S), false for padding: the ``attention_mask`` where it is of that shape, else None."""
        mask = self.kwargs.get("attention_mask")
        return mask if isinstance(mask, Tensor) and mask.shape == self.tokens.shape else None

    def check_length(self, block_size: int) -> None:
        """Check that there is something to leave out.

        Raises:
            UsageError: The text is shorter than two blocks.
        """
        length = self.tokens.shape[1]
        if length < 2 * block_size:
            raise UsageError(
                f"the text must be of two blocks at least, {2 * block_size} tokens, got {length}: "
                "take a longer text or a smaller block_size"
            )


@dataclasses.dataclass(frozen=True)
class SparsePrefill:
    """One sparse prefill.

    Attributes:
        logits: (B, S, vocabulary).
        densities: (B, H) for each rewritten attention call, the share of the blocks under its mask that are computed.
        report: What became of each attention call.
    """

    logits: Tensor
    densities: tuple[Tensor, ...]
    report: RewriteReport

    @property
    def density(self) -> float:
        """Mean share of the blocks computed, over calls, prompts and heads; waits for the device."""
        return torch.stack([density.mean() for density in self.densities]).mean().item()


def prefill_dense(model: Model, prompt: Prompt) -> Tensor:
    """Run a model as it is, uncompiled; return its logits, (B, S, vocabulary).

    Raises:
        UsageError: It is no causal language model.
    """
    with torch.no_grad():
        return _read_logits(uncompiled_call(model)(*prompt.args, **prompt.kwargs), prompt.tokens)


def prefill_sparse(
    model: Model, prompt: Prompt, options: Mapping[str, Any], backend: FlexPrefillBackend | None = None
) -> SparsePrefill:
    """Compile a model for this one prompt length, as ``torch.compile`` does, and run it.

    Args:
        model: A causal language model.
        prompt: Its inputs.
        options: As for ``torch.compile``.
        backend: What compiles it; a new one by default.

    Raises:
        UsageError: No attention call was rewritten, or it is no causal language model.
        InvalidOptionError: An unknown option, or a value out of range.
    """
    backend = FlexPrefillBackend() if backend is None else backend
    compiled = torch.compile(uncompiled_call(model), backend=backend, options=dict(options), dynamic=False)
    with torch.no_grad(), without_recompile_limit(), record_densities() as densities:
        logits = _read_logits(compiled(*prompt.args, **prompt.kwargs), prompt.tokens)
    if not backend.report.num_rewritten:
        raise UsageError(f"no attention call was rewritten: {_explain(backend.report)}")
    return SparsePrefill(logits, tuple(densities), backend.report)


def _read_logits(output: Any, tokens: Tensor) -> Tensor:
    """Return the logits in what a causal language model returns: the output, its ``logits``, or its first item.

    Raises:
        UsageError: They are no (B, S, vocabulary).
    """
    logits = getattr(output, "logits", output[0] if isinstance(output, tuple) and output else output)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != tokens.shape:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise UsageError(
            f"the model must be a causal language model, with logits of (batch, length, vocabulary), got {shape}"
        )
    return logits


def _explain(report: RewriteReport) -> str:
    reasons = {site.reason.value + (f" ({site.detail})" if site.detail else "") for site in report.sites if site.reason}
    return "; ".join(sorted(reasons)) or "the model has none that is recognised"
