"""Queries, keys and values that somebody saved: what to time where the model they come from isn't at hand."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from ...errors import UsageError

SAVED = "saved"  # the kind of inputs, as the tables name it


def load_inputs(path: Path, length: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Load the first tokens of a tuple that ``torch.save`` wrote: query (1, H, S, D), key and value (1, Hkv, S, D).

    Args:
        path: Of the file.
        length: In tokens, no more than the file has.
        device: Where.
        dtype: Of the result.

    Raises:
        UsageError: No such file, no such tensors in it, or too few tokens.
    """
    try:
        query, key, value = torch.load(path, map_location="cpu", weights_only=True)
        shapes = [tuple(x.shape) for x in (query, key, value)]
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UsageError(f"{path} must hold query, key and value: {type(error).__name__}: {error}") from None
    if not _do_fit(shapes):
        raise UsageError(f"{path} must hold (1, H, S, D) and twice (1, Hkv, S, D), got {shapes}")
    if length > query.shape[2]:
        raise UsageError(f"{path} has {query.shape[2]} tokens, got a length of {length}")
    query, key, value = (x[:, :, :length].to(device, dtype).contiguous() for x in (query, key, value))
    return query, key, value


def _do_fit(shapes: list[tuple[int, ...]]) -> bool:
    query, key, value = shapes
    return len(query) == 4 and key == value and query[::3] == key[::3] and query[2] == key[2] and query[1] % key[1] == 0
