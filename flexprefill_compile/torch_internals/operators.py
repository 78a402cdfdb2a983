"""What it takes to define an operator of higher order: one that takes functions, as FlexAttention's does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

from torch import Tensor
from torch._C import DispatchKey
from torch._higher_order_ops.utils import reenter_make_fx, register_fake
from torch._inductor.lowering import lowerings, register_lowering
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule
from torch.fx.experimental import _config as _symbolic_shapes_config
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, track_tensor_tree
from torch.utils import _pytree as pytree

__all__ = [
    "DispatchKey",
    "HigherOrderOperator",
    "ProxyTorchDispatchMode",
    "ignore_functions_of",
    "lowerings",
    "register_fake",
    "register_lowering",
    "retrace",
    "trace_call",
    "without_guards_on_sizes",
]


def ignore_functions_of(operator: HigherOrderOperator) -> None:
    """Keep inductor from warning that it knows no examples for the functions that an operator takes; it needs none."""
    warnings.filterwarnings(
        "ignore", f"Please add support for subgraph args to function {operator.name()}", UserWarning
    )


def retrace(function: Callable[..., Tensor], examples: Sequence[Any]) -> GraphModule:
    """Trace a function that an operator takes, inside the trace of the call of the operator."""
    return cast("GraphModule", reenter_make_fx(function)(*examples))


def trace_call(
    mode: ProxyTorchDispatchMode, operator: HigherOrderOperator, arguments: Sequence[Any], functions: Sequence[str]
) -> Any:
    """Put a call of an operator into the graph that a mode traces; return its example outputs, which follow it.

    Args:
        mode: What traces.
        operator: What is called.
        arguments: Its arguments; GraphModules among them become submodules of what is traced.
        functions: Names for these submodules, in order.
    """
    example = operator(*arguments)
    root = cast("Any", mode.tracer).root
    names = iter(functions)
    for argument in arguments:
        if isinstance(argument, GraphModule):
            root.register_module(cast("Any", mode.tracer).get_fresh_qualname(next(names)), argument)
    proxies = pytree.tree_map(cast("Any", mode.tracer).unwrap_proxy, tuple(arguments))
    call = mode.tracer.create_proxy("call_function", operator, proxies, {})
    return track_tensor_tree(example, call, constant=None, tracer=mode.tracer)


def without_guards_on_sizes() -> AbstractContextManager[Any]:
    """Keep ``guard_or_false`` from deciding by the sizes of an example: only what holds for all sizes is true."""
    patch: Any = _symbolic_shapes_config.patch  # type: ignore[attr-defined]  # torch adds it at run time
    return cast("AbstractContextManager[Any]", patch(backed_size_oblivious=True))
