"""Queries, keys and values of a layer of a real model, on real text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ...errors import UsageError


class _RecordAttention(TorchFunctionMode):
    """Keeps the inputs of one attention call of a forward pass."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer, self.calls = layer, 0
        self.inputs: tuple[Tensor, ...] = ()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            if self.calls == self.layer:
                self.inputs = args[:3]
            self.calls += 1
        return func(*args, **(kwargs or {}))


def create_real_inputs(
    model_path: Path | None, length: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Prefill a text, repeated as often as it takes, and return what the middle layer attends over.

    Args:
        model_path: A Hugging Face folder or GGUF file; None is SmolLM2-135M-Instruct.
        length: In tokens, no more than the model was made for.
        device: Where.
        dtype: Of the result.

    Raises:
        UsageError: No such model, the extra "hf" is missing, or the model takes fewer tokens.
    """
    try:
        from ...models import load_model, read_tokens  # noqa: PLC0415  (needs the extra "hf")
    except ModuleNotFoundError as error:
        raise UsageError(f"real inputs need {error.name}: pip install 'flexprefill-compile[hf]'") from None
    model, tokenizer = load_model(model_path, device)
    most = model.config.max_position_embeddings
    if length > most:
        raise UsageError(f"the model takes {most} tokens")
    tokens, _ = read_tokens(tokenizer, None, length)
    tokens = tokens.repeat(1, -(-length // tokens.shape[1]))[:, :length].to(device)
    with torch.no_grad(), _RecordAttention(model.config.num_hidden_layers // 2) as record:
        model(tokens, use_cache=True, logits_to_keep=1)
    query, key, value = (x.to(dtype).contiguous() for x in record.inputs)
    return query, key, value
