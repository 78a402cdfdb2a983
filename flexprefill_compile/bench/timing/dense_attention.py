"""Dense attention as the yardstick: each backend of ``scaled_dot_product_attention`` that is worth timing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .clocks import time_ms

_TIMED_BACKENDS = {
    "cpu": (SDPBackend.FLASH_ATTENTION,),
    "cuda": (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION),  # the others are slower still
}


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend causally with shared key heads."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def find_fastest_dense(query: Tensor, key: Tensor, value: Tensor) -> SDPBackend:
    """Return the dense backend that takes the least time for the inputs."""
    times = time_dense_ms(query, key, value, calls=3)
    return _find_backend(min(times, key=lambda name: times[name]), query.device.type)


def time_dense_ms(query: Tensor, key: Tensor, value: Tensor, calls: int) -> dict[str, float]:
    """Time each dense backend that takes the inputs, by its name.

    Raises:
        torch.OutOfMemoryError: One of them doesn't fit into memory.
    """
    times = {}
    for backend in _TIMED_BACKENDS[query.device.type]:
        name = name_backend(backend)
        try:
            times[name] = time_ms(bind_dense(name, query, key, value), query.device.type, calls)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # not built in, or not for these inputs
            continue
    return times


def bind_dense(name: str, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    """Return the call of a dense backend, by the name that ``time_dense_ms`` gives it."""
    backend = _find_backend(name, query.device.type)

    def attend_by_backend() -> Tensor:
        with sdpa_kernel(backend):
            return attend(query, key, value)

    return attend_by_backend


def list_backends(device_type: str) -> list[str]:
    """Return the names of the backends that are worth timing on a device."""
    return [name_backend(backend) for backend in _TIMED_BACKENDS[device_type]]


def name_backend(backend: SDPBackend) -> str:
    """Return the name under which a dense backend is printed."""
    return backend.name.removesuffix("_ATTENTION").lower()


def _find_backend(name: str, device: str) -> SDPBackend:
    return next(backend for backend in _TIMED_BACKENDS[device] if name_backend(backend) == name)
