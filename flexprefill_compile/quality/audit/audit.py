"""``audit``: what one sparse prefill of a model kept and lost, per attention call, layer and head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from flexprefill_compile.block_masks import create_prefill_block_mask
from flexprefill_compile.block_masks.layout import count_causal_blocks
from flexprefill_compile.block_masks.observed_attention import ObservedAttention
from flexprefill_compile.passes.layer_config import config_for_layer, number_layer

from ...backend import flexprefill
from ...settings.config import InvalidOptionError, SparsePrefillConfig, split_options
from ...settings.device_defaults import resolve_selection
from ...torch_internals import compile_settings, inductor_option_names
from ..model_prefill import Model, Prompt, prefill_dense
from ..predictions import compare_predictions
from ..sparsity import check_sparsity
from .attention_call import BlockPicture, CallMeasurement, measure_call
from .observe import prefill_observed
from .pattern import find_patterns
from .report import AuditReport, CallAudit, HeadAudit

ROWS = 128


def audit(
    model: Model,
    /,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    rows: int = ROWS,
    progress: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> AuditReport:
    """Prefill a causal language model dense and sparse, and tell what the sparse one lost.

    The sparse prefill is the compiled one that ``torch.compile`` makes with the same options, with one op more for each
    rewritten attention call, at which its tensors are looked at. Recall and error are exact on the sampled rows. Memory
    holds the logits of both prefills, the dense ones on the CPU, and one attention call's figures at a time. Waits for
    the device.

    Args:
        model: A Hugging Face causal language model, or what returns logits of (B, S, vocabulary) as it does.
        *args: Its inputs, the (B, S) tokens first unless ``input_ids`` gives them.
        options: As for ``torch.compile``; None is what the model was compiled or decorated with, or else the defaults.
            Prompts are sparse from two blocks on unless ``min_length`` is given.
        rows: Query rows of each head to compute exactly, spread over the prompt.
        progress: Called with a few words at each step.
        **kwargs: Its inputs by name; tokens that a (B, S) ``attention_mask`` hides don't count.

    Raises:
        UsageError: The model is no causal language model, every block of the text would be computed, or no attention
            call was rewritten.
        InvalidOptionError: An unknown option, or a value out of range.
    """
    if options is None:
        options = compile_settings(model, flexprefill.__name__).get("options")
    config, _ = split_options(options, inductor_option_names())
    if config.sequence_parallel is not None:
        raise InvalidOptionError("audit needs the whole prompt on one rank: leave sequence_parallel out")
    prompt = Prompt(args, kwargs)
    config = resolve_selection(config, options or {}, prompt.tokens.device)
    check_sparsity(prompt.tokens.shape[1], config)
    say = progress or (lambda _: None)
    say("dense prefill")
    with torch.compiler.set_stance("force_eager"):  # parts of the model may be compiled on their own
        dense_logits = prefill_dense(model, prompt).cpu()
    say("compiling")
    auditor = _Auditor(config, say)
    options = {"min_length": 2 * config.block_size, "block_size": config.block_size} | dict(options or {})
    sparse = prefill_observed(model, prompt, options, auditor, rows)
    say("comparing predictions")
    return AuditReport(
        num_tokens=prompt.tokens.shape[1],
        num_prompts=prompt.tokens.shape[0],
        num_rows=min(rows, prompt.tokens.shape[1]),
        options={name: value if _is_plain(value) else str(value) for name, value in options.items()},
        num_attention_calls=len(sparse.report.sites),
        predictions=compare_predictions(dense_logits, sparse.logits, prompt.tokens, prompt.is_counted),
        calls=tuple(auditor.calls),
        pictures=tuple(auditor.pictures),
    )


def _is_plain(value: object) -> bool:
    """Tell whether a value survives JSON unchanged."""
    return value is None or isinstance(value, bool | int | float | str)


class _Auditor:
    """Observes attention calls and keeps a few numbers of each."""

    def __init__(self, config: SparsePrefillConfig, say: Callable[[str], None]) -> None:
        self.config = config
        self.say = say
        self.calls: list[CallAudit] = []
        self.pictures: list[BlockPicture] = []

    def __call__(self, call: ObservedAttention) -> None:
        self.say(f"attention call {len(self.calls) + 1}: {call.name}")
        config = config_for_layer(self.config, number_layer(call.name), call.query.shape[1]) or self.config
        measured = measure_call(call, config.block_size)
        patterns = find_patterns(call, config)
        heads = tuple(_describe_head(measured, head, *pattern) for head, pattern in enumerate(patterns))
        self.calls.append(CallAudit(call.name, heads, measure_shorter_prompts(call, config)))
        self.pictures.append(measured.picture)


def _describe_head(measured: CallMeasurement, head: int, pattern: str, distance: float | None) -> HeadAudit:
    recall = measured.recall[:, head][measured.is_counted].double()
    if recall.numel() == 0:
        recall = torch.full((1,), torch.nan, dtype=torch.float64)
    return HeadAudit(
        pattern=pattern,
        distance=distance,
        density=measured.density[head].item(),
        recall_mean=recall.mean().item(),
        recall_p10=recall.quantile(0.1).item(),
        recall_worst=recall.min().item(),
        error=measured.error[head].item(),
    )


def measure_shorter_prompts(call: ObservedAttention, config: SparsePrefillConfig) -> dict[int, float]:
    """Return the density of the call's first tokens as a prompt of their own, mean over prompts and heads.

    In causal attention they have the same queries and keys then, but for what the calls before left out.

    Returns:
        By length in tokens, halves of the prompt down to 8 blocks; empty under a mask.
    """
    if call.facts is not None:
        return {}
    densities: dict[int, float] = {}
    length = call.query.shape[2] // 2
    while length >= 8 * config.block_size:
        mask = create_prefill_block_mask(
            call.query[:, :, :length], call.key[:, :, :length], config, scale=call.rule.scale
        )
        num_blocks = mask.kv_num_blocks.shape[-1]
        full = 0 if mask.full_kv_num_blocks is None else mask.full_kv_num_blocks
        computed = (mask.kv_num_blocks + full).sum(-1)
        densities[length] = (computed / count_causal_blocks(num_blocks)).mean().item()
        length //= 2
    return densities
