"""Prefill a model sparse and look at each rewritten attention call while it runs, one call at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexprefill_compile.block_masks.observed_attention import Observer, observe_attention

from ...backend import FlexPrefillBackend
from ..model_prefill import Model, Prompt, SparsePrefill, prefill_sparse


def prefill_observed(
    model: Model, prompt: Prompt, options: Mapping[str, Any], observer: Observer, num_rows: int
) -> SparsePrefill:
    """Compile a model as ``prefill_sparse`` does, with one op more for each rewritten call, and run it.

    The op shows the call's tensors to ``observer`` and copies its output; they live no longer than the call does.

    Args:
        model: A causal language model.
        prompt: Its inputs.
        options: As for ``torch.compile``.
        observer: Takes an ``ObservedAttention`` for each rewritten call, in the order they run.
        num_rows: Query rows of each call to show in detail, spread over the prompt.

    Raises:
        UsageError: No attention call was rewritten, or the model is no causal language model.
        InvalidOptionError: An unknown option, or a value out of range.
    """
    with observe_attention(observer):
        return prefill_sparse(model, prompt, options, FlexPrefillBackend(observed_rows=num_rows))
