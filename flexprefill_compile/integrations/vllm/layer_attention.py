"""One of vLLM's attention layers: whether it may attend sparsely, how, and the keys and values that a chunk sees."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from flexprefill_compile.passes.match.site import describe_shapes

from ...report import AttentionSkippedError, Skipped, SkipReason
from ..compiled_attention import Refusal
from .pages import as_one_batch, find_first_token, gather_pages, split_cache
from .plan import Prefill, log_once
from .prompt_attention import Form, attend_to_prompt
from .settings import Settings

_PLAIN_CACHES = ("auto", "float16", "bfloat16", "float32")


class LayerAttention:
    """Sparse attention of one layer."""

    def __init__(self, impl: Any, settings: Settings, name: str) -> None:
        """Take a layer's own settings.

        Args:
            impl: vLLM's implementation of its attention.
            settings: Of the engine.
            name: Of the layer.

        Raises:
            InvalidOptionError: The settings by layer or head are for another model.
            AttentionSkippedError: ``on_skip="raise"`` and the layer has to stay dense.
        """
        self._name, self._settings = name, settings
        self._config = settings.of_layer(name, impl.num_heads)
        self._head_size: int = impl.head_size
        self._shares_cache = impl.kv_sharing_target_layer_name is not None
        self._form = Form(impl.scale, find_window(impl), impl.logits_soft_cap or None)
        self._sinks: Tensor | None = impl.sinks
        self._refusal = find_refusal(impl, settings.min_length)
        if self._refusal is not None:
            self._report(self._refusal, None)

    @property
    def is_sparse(self) -> bool:
        """Whether prefills run sparse, as far as it is known."""
        return self._config is not None and self._refusal is None

    def attend(
        self, prefill: Prefill, inputs: tuple[Tensor, Tensor, Tensor], kv_cache: Tensor, block_table: Tensor
    ) -> Tensor | None:
        """Attend sparsely; None where the attention has to stay dense, which is logged.

        Args:
            prefill: Of the step.
            inputs: Query (tokens, H, D), key and value (tokens, Hkv, D) of the whole step.
            kv_cache: The layer's pages, which hold the step's keys and values.
            block_table: (num_rows, max_pages), where the pages of each row are.

        Returns:
            (query_length, H, D).

        Raises:
            AttentionSkippedError: ``on_skip="raise"`` and it has to stay dense.
        """
        assert self._config is not None
        query = as_one_batch(inputs[0][prefill.tokens])
        key, value = self._find_keys(prefill, inputs, kv_cache, block_table)
        output = attend_to_prompt(query, key, value, self._sinks, self._form, self._config, self._settings.inductor)
        if isinstance(output, Tensor):
            return output[0].transpose(0, 1)
        self._report(output, (query, key))
        return None

    def _find_keys(
        self, prefill: Prefill, inputs: tuple[Tensor, Tensor, Tensor], kv_cache: Tensor, block_table: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what the queries see, (1, Hkv, Skv, D) each: the step's own where nothing came before it."""
        if prefill.context == 0 and not self._shares_cache:
            return as_one_batch(inputs[1][prefill.tokens]), as_one_batch(inputs[2][prefill.tokens])
        key_pages, value_pages = split_cache(kv_cache, self._head_size)
        first = find_first_token(prefill.context, self._form.window, key_pages.shape[1])
        take = functools.partial(
            gather_pages, table=block_table[prefill.row], first_token=first, end_token=prefill.key_length
        )
        return take(key_pages), take(value_pages)

    def _report(self, refusal: Refusal, tensors: tuple[Tensor, Tensor] | None) -> None:
        reason, detail = refusal
        if self._config is not None and self._config.on_skip == "raise" and not reason.is_by_design:
            shapes = describe_shapes(*(tensors or (None, None)))
            raise AttentionSkippedError(Skipped(self._name, shapes, reason, detail))
        log_once(f"{reason.value}: {detail}" if detail else reason.value)


def find_window(impl: Any) -> int | None:
    """Return how many keys a query of a layer sees, its own among them; None for all before it."""
    left = impl.sliding_window[0]
    return None if left < 0 else left + 1


def find_refusal(impl: Any, min_length: int) -> Refusal | None:
    """Return why a layer is left to vLLM whatever the step, or None.

    Args:
        impl: vLLM's implementation of its attention.
        min_length: In tokens; a window that is shorter leaves nothing to gain.
    """
    window = find_window(impl)
    ranks = max(getattr(impl, name, 1) for name in ("dcp_world_size", "pcp_world_size"))
    refusals: dict[Refusal, bool] = {
        (SkipReason.NOT_CAUSAL, f"attention of type {impl.attn_type}"): impl.attn_type != "decoder",
        (SkipReason.TOO_SHORT, f"a window of {window} < {min_length}"): window is not None and window < min_length,
        (SkipReason.DTYPE, f"a KV cache of {impl.kv_cache_dtype}"): impl.kv_cache_dtype not in _PLAIN_CACHES,
        (SkipReason.UNRECOGNISED, "ALiBi"): impl.alibi_slopes is not None,
        (SkipReason.UNRECOGNISED, "context parallelism"): ranks > 1,
    }
    return next((refusal for refusal, holds in refusals.items() if holds), None)
