"""Other implementations to time beside ours: any callable ``f(query, key, value)`` that attends causally."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..errors import UsageError

Peer = Callable[[Tensor, Tensor, Tensor], Tensor]


def load_peer(path: str) -> Peer:
    """Import a callable by ``module:function``; modules of the current folder are found too.

    It takes query (1, H, S, D), key and value (1, Hkv, S, D), and returns (1, H, S, D).

    Raises:
        UsageError: There is no such callable.
    """
    module_name, _, name = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        peer: Peer = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"peer must be module:function, got {path!r}: {error}") from None
    if not callable(peer):
        raise UsageError(f"peer must be module:function, got {path!r}, which is a {type(peer).__name__}")
    return peer
