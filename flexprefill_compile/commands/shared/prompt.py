"""The model and the text of a command's ``add_prompt`` arguments; it needs the extra "hf"."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

from torch import Tensor

from ...devices import check_device


class LoadedPrompt(NamedTuple):
    """What a command prefills.

    Attributes:
        model: A causal language model, on the device that was asked for.
        tokenizer: Its tokenizer.
        tokens: (1, S) int64, on the same device.
        description: The text, its length, the model's size and the device in a line.
    """

    model: Any
    tokenizer: Any
    tokens: Tensor
    description: str


def check_prompt(arguments: argparse.Namespace) -> None:
    """Check all that can be checked before a model is loaded.

    Raises:
        UsageError: The device, the model or the text is missing.
    """
    from ...models import find_model, read_text  # noqa: PLC0415  (needs the extra "hf")

    check_device(arguments.device)
    find_model(arguments.model)
    read_text(arguments.text)


def load_prompt(arguments: argparse.Namespace) -> LoadedPrompt:
    """Load the model and the start of the text.

    Raises:
        UsageError: One of them is missing, or is not what it must be.
    """
    from ...models import load_model, read_tokens  # noqa: PLC0415  (needs the extra "hf")

    model, tokenizer = load_model(arguments.model, arguments.device)
    tokens, source = read_tokens(tokenizer, arguments.text, arguments.tokens)
    size = f"{tokens.shape[1]} tokens, {model.num_parameters() / 1e6:.0f}M parameters"
    return LoadedPrompt(model, tokenizer, tokens.to(model.device), f"{source}: {size}, {arguments.device}")
