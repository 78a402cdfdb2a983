"""What a model loses and computes on some texts with settings by layer: one uncompiled prefill a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flexprefill_compile.block_masks.layout import BlockTables, compute_density

from ...errors import UsageError
from ...settings.config import SparsePrefillConfig
from ..model_prefill import Prompt, prefill_dense
from ..predictions import sum_loss
from ..swapped_attention import Attend, attend_selected, swapped_attention

# Takes query, key, value, the scale and the layer's config.
Select = Callable[[Tensor, Tensor, Tensor, float, SparsePrefillConfig], BlockTables]
# By layer; a layer that is missing keeps dense attention.
LayerConfigs = Mapping[int, SparsePrefillConfig]


def select_tables(query: Tensor, key: Tensor, value: Tensor, scale: float, config: SparsePrefillConfig) -> BlockTables:
    """Select the blocks of one attention call by the op that compiled graphs call."""
    select: Callable[..., Any] = torch.ops.flexprefill.select_blocks
    return BlockTables(*select(query, key, value, scale, *config.selection))


class DenseRun(NamedTuple):
    """What the texts give with dense attention.

    Attributes:
        loss: Mean negative log-likelihood of their tokens, nats.
        heads: The number of query heads of each layer that attends.
        plain_layers: Those whose attention is a plain causal prefill, in ascending order: they can be made sparse here.
    """

    loss: float
    heads: dict[int, int]
    plain_layers: list[int]


class TextMeasurer:
    """Measures settings of one model on the same texts.

    Attributes:
        model: A Hugging Face causal language model, in inference.
        texts: The texts, (1, S) int64 each, on the model's device.
        select: Chooses the blocks of one attention call.
    """

    def __init__(self, model: nn.Module, texts: Sequence[Tensor], select: Select = select_tables) -> None:
        self.model, self.texts, self.select = model, texts, select

    @cached_property
    def dense(self) -> DenseRun:
        """What the texts give with dense attention.

        Raises:
            UsageError: No attention of the model can be made sparse.
        """
        heads: dict[int, int] = {}
        plain: set[int] = set()

        def note(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
            plain.add(layer)

        loss = self._mean_loss(note, heads)
        if not plain:
            raise UsageError(f"no attention of {type(self.model).__name__} is a plain causal prefill by SDPA")
        return DenseRun(loss, dict(sorted(heads.items())), sorted(plain))

    def measure(self, configs: LayerConfigs) -> tuple[float, dict[int, float]]:
        """Prefill each text with the settings given.

        Returns:
            The increase of the mean loss over dense attention's, nats, and the density of each plain layer: the mean
            share of its causal blocks computed, over heads and texts. Waits for the device.
        """
        densities: dict[int, list[Tensor]] = {layer: [] for layer in self.dense.plain_layers}

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor | None:
            if layer not in configs:
                return None
            tables = self.select(query, key, value, scale, configs[layer])
            densities[layer].append(compute_density(tables))
            return attend_selected(query, key, value, tables, scale, configs[layer].block_size)

        increase = self._mean_loss(attend) - self.dense.loss
        return increase, {layer: torch.cat(found).mean().item() if found else 1.0 for layer, found in densities.items()}

    def _mean_loss(self, attend: Attend, heads: dict[int, int] | None = None) -> float:
        """Prefill each text; collect the heads of each layer on the way."""
        total = 0.0
        for text in self.texts:
            # With a cache, transformers leave a prompt's causal mask to SDPA.
            with swapped_attention(self.model, attend) as found:
                logits = prefill_dense(self.model, Prompt((text,), {"use_cache": True}))
            (heads if heads is not None else {}).update(found)
            total += sum_loss(logits[0], text[0])
        return total / sum(text.shape[1] - 1 for text in self.texts)
