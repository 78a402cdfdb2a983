"""Every private name of torch that this project uses, in one place.

Checked on torch 2.11 to 2.15. What a new torch release moves or renames is repaired here.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from types import FunctionType, MethodType, ModuleType
from typing import Any, cast

import torch
from torch import SymInt, Tensor, nn
from torch._C import _disabled_torch_function_impl as disabled_torch_function
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch._dynamo import config as _dynamo_config
from torch._dynamo import maybe_mark_dynamic
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch._dynamo.exc import RestartAnalysis, ShortenTraceback, SkipFrame, Unsupported, UserError
from torch._guards import tracing
from torch._higher_order_ops.flex_attention import _permute_strides
from torch._higher_order_ops.flex_attention import flex_attention as flex_attention_hop
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.compiler import config as _compiler_config
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true
from torch.nn.attention.flex_attention import _apply_kernel_options

__all__ = [
    "CAPTURE_ERRORS",
    "CONTROL_FLOW",
    "FUSED_ATTENTION",
    "FakeTensor",
    "FakeTensorMode",
    "OpOverload",
    "OpOverloadPacket",
    "PassesThroughDynamo",
    "TransformGetItemToIndex",
    "attention_strides",
    "compile_settings",
    "compile_with_inductor",
    "compiler_config",
    "complete_kernel_options",
    "copy_function",
    "cpp_flex_attention_template",
    "disabled_torch_function",
    "find_process_group",
    "flex_attention_hop",
    "guard_or_false",
    "has_cuda_graphs",
    "inductor_config",
    "inductor_option_names",
    "is_parameter",
    "is_size_expression",
    "list_mode_options",
    "make_fx_under",
    "maybe_mark_dynamic",
    "share_storage",
    "statically_known_true",
    "sum_over_ranks",
    "uncompiled_call",
    "without_recompile_limit",
    "written_arguments",
]

_copies = itertools.count()


class PassesThroughDynamo(ShortenTraceback):
    """An error that reaches the caller of a compiled function as itself.

    Dynamo wraps what else a backend raises into BackendCompilerFailed, with pages of its own frames.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)
        self.message = message

    def __str__(self) -> str:
        """Return the message without the advice that dynamo adds for its own errors."""
        return self.message


compiler_config: Any = _compiler_config  # torch adds its ``patch`` at run time, where mypy can't see it

MARKED_CACHEABLE = "unsafe_marked_cacheable_functions"

# How dynamo steers a compile, and errors meant for the user: never a failed lowering.
CONTROL_FLOW = (RestartAnalysis, SkipFrame, PassesThroughDynamo)

# What dynamo raises where it can't capture a function as one graph.
CAPTURE_ERRORS = (Unsupported, UserError)

# Attention inside one call together with its projections: what nn.MultiheadAttention and nn.TransformerEncoderLayer
# leave in a dynamo graph.
FUSED_ATTENTION = frozenset(
    {
        nn.functional.multi_head_attention_forward,
        torch._native_multi_head_attention,
        torch._transformer_encoder_layer_fwd,
    }
)


def written_arguments(target: OpOverload | OpOverloadPacket) -> set[tuple[int, str]]:
    """Return the positions and names of the arguments that an op changes in place, by any of its overloads."""
    overloads = [target] if isinstance(target, OpOverload) else [getattr(target, name) for name in target.overloads()]
    return {
        (position, argument.name)
        for overload in overloads
        for position, argument in enumerate(overload._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    }


def share_storage(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors of a dynamo graph are views of one piece of memory."""
    return _storage_of(a) == _storage_of(b)


def _storage_of(tensor: Tensor) -> int:
    while is_functorch_wrapped_tensor(tensor):  # inside a vmap, such as FlexAttention's block masks are made in
        tensor = get_unwrapped(tensor)
    return int(tensor.untyped_storage()._cdata)


def find_process_group(name: str) -> Any:
    """Return the process group of a name, as functional collectives find it."""
    return import_module("torch.distributed.distributed_c10d")._resolve_process_group(name)


def sum_over_ranks(x: Tensor, group_name: str) -> Tensor:
    """Return the sum of a tensor over the ranks of a group, by a functional collective that compiles."""
    ops = torch.ops._c10d_functional
    return cast("Tensor", ops.wait_tensor(ops.all_reduce(x, "sum", group_name)))


def is_parameter(node: Node) -> bool:
    """Tell whether an input of a dynamo graph is a parameter or a buffer of a module."""
    if node.op == "get_attr":
        return True
    name = getattr(getattr(node, "_dynamo_source", None), "name", "")
    path = str(name() if callable(name) else name)
    return "._parameters[" in path or "._buffers[" in path


def is_size_expression(number: object) -> bool:
    """Tell whether a number is a symbolic size that is computed from others."""
    return isinstance(number, SymInt) and not number.node.expr.is_symbol and not number.node.expr.is_number


def inductor_option_names() -> frozenset[str]:
    """Return the names that inductor accepts in ``options=``."""
    return frozenset(inductor_config.get_config_copy())


def has_cuda_graphs(config_patches: Mapping[str, Any]) -> bool:
    """Tell whether inductor will replay what it compiles as CUDA graphs."""
    return bool(config_patches.get("triton.cudagraphs", inductor_config.triton.cudagraphs))


def compile_with_inductor(
    graph_module: GraphModule, example_inputs: Sequence[Any], config_patches: dict[str, Any]
) -> Callable[..., Any]:
    """Compile a dynamo graph as ``backend="inductor"`` does, and cache it even if it chooses between branches.

    Inductor's caches refuse graphs with ``torch.cond`` that isn't marked, though their keys see what the branches hold.
    """
    has_branches = any(node.target is torch.ops.higher_order.cond for node in graph_module.graph.nodes)
    if has_branches and hasattr(inductor_config, MARKED_CACHEABLE):
        marked = getattr(inductor_config, MARKED_CACHEABLE) | {"torch.ops.higher_order.cond": "its branches are hashed"}
        config_patches = {MARKED_CACHEABLE: marked} | config_patches
    return cast("Callable[..., Any]", compile_fx(graph_module, example_inputs, config_patches=config_patches))


def uncompiled_call(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return what calling a model means without the compilation it may have had, hooks included."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        return model
    forward = getattr(type(model).forward, "_torchdynamo_orig_callable", None)
    if forward is not None:  # a class whose forward is compiled
        model = copy.copy(model)
        model.forward = MethodType(forward, model)
    return model._call_impl


def compile_settings(model: Callable[..., Any], backend_name: str) -> dict[str, Any]:
    """Return the arguments of ``torch.compile`` with which a model was compiled for a backend.

    Args:
        model: A function or nn.Module: compiled, compiled in place, of a class whose forward is, or none of these.
        backend_name: Of the backend; what was compiled for others does not count.

    Returns:
        ``dynamic``, and ``options`` or ``mode`` if they were given; empty if it was not so compiled.
    """
    for part in (model, getattr(model, "_compiled_call_impl", None), getattr(model, "forward", None)):
        wrapper = _find_backend(part)
        if getattr(wrapper, "compiler_name", None) == backend_name:
            return {"dynamic": wrapper.dynamic, **wrapper.kwargs}
    return {}


def _find_backend(compiled: Any) -> Any:
    """Return what calls the backend of a compiled module, function or method; None if it is not compiled."""
    function = getattr(compiled, "__func__", compiled)
    context = getattr(function, "dynamo_ctx", None)
    if context is None and inspect.isfunction(function) and hasattr(function, "_torchdynamo_orig_callable"):
        context = inspect.getclosurevars(function).nonlocals.get("self")
    backend: Any = getattr(context, "callback", None)
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return backend


def make_fx_under(fake_mode: FakeTensorMode, function: Callable[..., Any], *examples: Any) -> GraphModule:
    """Trace a function into ATen ops on fake tensors and symbols of one fake mode, for inference.

    Dynamo gives a backend a fake mode of its own, other than that of the graph's examples; it is set aside.
    """
    with torch.no_grad(), tracing(None), fake_mode:
        return make_fx(function, tracing_mode="symbolic")(*examples)


def without_recompile_limit() -> AbstractContextManager[Any]:
    """Keep dynamo from giving up on a function that it has compiled a few times, for other backends or options."""
    patch: Any = _dynamo_config.patch  # torch adds it at run time, where mypy can't see it
    return cast("AbstractContextManager[Any]", patch(recompile_limit=2**30, accumulated_recompile_limit=2**30))


def complete_kernel_options(
    options: dict[str, Any], query: Tensor, key: Tensor, value: Tensor, *, returns_logsumexp: bool = False
) -> dict[str, Any]:
    """Add the options that FlexAttention's op expects beside the user's, for inference."""
    with torch.no_grad():
        completed = _apply_kernel_options(query, key, value, return_lse=False, kernel_options=cast("Any", options))
    return dict(completed) | ({"OUTPUT_LOGSUMEXP": True} if returns_logsumexp else {})


def attention_strides(output: Tensor, query: Tensor) -> tuple[int, ...]:
    """Return the strides that FlexAttention gives an output of this shape."""
    return _permute_strides(output.to("meta"), query.stride()).stride()


def copy_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Copy a function with its code: after a few compilations of one code object, dynamo runs it uncompiled.

    The copy's code has another name, by which dynamo keeps what sizes and numbers were seen to change.
    """
    assert isinstance(function, FunctionType)
    code = function.__code__.replace(co_name=f"{function.__code__.co_name}_{next(_copies)}")
    copied = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def cpp_flex_attention_template() -> ModuleType:
    """Import the module of inductor's FlexAttention for the CPU, which needs the lowerings imported first."""
    import_module("torch._inductor.lowering")
    return import_module("torch._inductor.codegen.cpp_flex_attention_template")
