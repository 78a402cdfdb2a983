"""The ways to attend that are compared: dense by each backend, sparse by its options, and peers."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import UsageError
from ...settings.config import SparsePrefillConfig, split_options
from ...torch_internals import copy_function, inductor_option_names
from ..peers import load_peer
from ..timing.dense_attention import attend, bind_dense, list_backends

# Takes query (1, H, S, D), key and value (1, Hkv, S, D); attends causally with scale 1 / sqrt(D).
AttendCausally = Callable[[Tensor, Tensor, Tensor], Tensor]


class Method(NamedTuple):
    """A way to attend.

    Attributes:
        name: What the tables call it.
        attend: The attention.
        is_dense: Whether it computes every block.
    """

    name: str
    attend: AttendCausally
    is_dense: bool = False


def list_dense_methods(device_type: str) -> list[Method]:
    """Return SDPA by each dense backend of a device."""

    def create(name: str) -> Method:
        return Method(f"dense {name}", lambda *inputs: bind_dense(name, *inputs)(), is_dense=True)

    return [create(name) for name in list_backends(device_type)]


def create_sparse_method(text: str) -> Method:
    """Compile attention with the options that a text gives; "default" gives none.

    Args:
        text: As ``estimator=auto,gamma=0.8,min_budget=512``; values are Python literals or words.

    Raises:
        UsageError: It is not of that form.
        InvalidOptionError: An unknown option, or a value out of range.
    """
    options = {} if text == "default" else dict(_read_option(part) for part in text.split(","))
    split_options(options, inductor_option_names())
    return Method(text, compile_sparse(options))


def compile_sparse(options: Mapping[str, Any]) -> AttendCausally:
    """Compile attention, once for each length, as a user's call is: always sparse, at any length and density."""
    settings = {"min_length": SparsePrefillConfig.block_size, "max_density": 1.0} | dict(options)
    by_shape: dict[torch.Size, AttendCausally] = {}

    def attend_sparse(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.shape not in by_shape:
            by_shape[query.shape] = torch.compile(
                copy_function(attend), backend="flexprefill", options=settings, dynamic=False, fullgraph=True
            )
        return by_shape[query.shape](query, key, value)

    return attend_sparse


def create_methods(device_type: str, sparse: Sequence[str], peers: Sequence[str]) -> list[Method]:
    """Return every method to compare, the dense ones first.

    Raises:
        UsageError: A text of options or a peer won't do.
        InvalidOptionError: An option is unknown or out of range.
    """
    return [
        *list_dense_methods(device_type),
        *(create_sparse_method(text) for text in sparse),
        *(Method(path, load_peer(path)) for path in peers),
    ]


def _read_option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--sparse must be NAME=VALUE,... or default, got {text!r}")
    try:
        return name.strip(), ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        return name.strip(), value.strip()
