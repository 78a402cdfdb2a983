"""``compile_layers_once``: layers that are alike are compiled once, whatever their number.

    model -> its lists of layers -> each layer's forward a region of torch.compile -> torch.compile as ever

torch traces layers anew where they may differ, and generates code for one graph of each kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from ..errors import UsageError
from ..torch_internals.regions import mark_region

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_MARK = "_flexprefill_region"


def compile_layers_once(model: ModuleT) -> ModuleT:
    """Let ``torch.compile`` generate code once for all layers that are alike; call it before the model is compiled.

    It marks each layer as ``torch.compiler.nested_compile_region`` does: an entry of an ``nn.ModuleList`` or
    ``nn.Sequential`` with parts of its own, beside others of its class. Results don't change, and settings by layer
    hold: layers of other settings get code of their own.

    Leave ``dynamic`` of ``torch.compile`` unset; changes of length are seen. ``dynamic=True`` makes inputs of a layer's
    own floats too, which torch can't compile as the scale of an attention in a region, unless
    ``torch._dynamo.config.specialize_float`` is set. Nor can it compile regions that write to a ``StaticCache``.

    Args:
        model: Changed in place: its layers get classes that are made here, so it can be copied but not pickled; its
            ``state_dict`` can. Run uncompiled, it is what it was.

    Returns:
        The model.

    Raises:
        UsageError: It is no nn.Module, or has no such layers.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"model must be an nn.Module, got {type(model).__name__}")
    layers = list(_find_layers(model))
    if not layers:
        raise UsageError(f"{type(model).__name__} has no list of layers of one class")
    unmarked: list[Any] = [layer for layer in layers if not hasattr(layer, _MARK)]
    marked = {kind: _mark(kind, len(layers)) for kind in map(type, unmarked)}
    for layer in unmarked:
        layer.__class__ = marked[type(layer)]
    return model


def _mark(kind: Any, num_layers: int) -> Any:
    """Return a class like another, whose forward is a region.

    A layer can't have the region as an attribute: torch 2.13 takes bound methods of other layers for the first one's.
    """
    named = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (kind,), named | {"forward": mark_region(kind.forward, num_layers), _MARK: True})


def _find_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost layers of a model: those of an expert, or of a part of a layer, belong to it."""
    for child in module.children():
        # An nn.Linear beside another is no layer: it has no parts.
        entries = [entry for entry in child.children() if list(entry.children())]
        classes = [type(entry) for entry in entries]
        if isinstance(child, nn.ModuleList | nn.Sequential) and len(classes) > len(set(classes)):
            yield from (entry for entry in entries if classes.count(type(entry)) > 1)
        else:
            yield from _find_layers(child)
