"""Ways around bugs of inductor's FlexAttention on the CPU, all in one place. The GPU path uses none of this.

1. A query or key that is a view of a Linear's output fails to lower (on 2.11, query and key that are views of one), and
   so does a pointwise consumer of the output, which inductor tries to fuse into the C++ template. The op
   ``flexprefill::realize``, a contiguous copy that inductor can't see through, keeps the template apart from both.
2. For float32 the C++ template multiplies queries by keys one score at a time, so slowly that dense attention wins.
   That product becomes a transposition and a call of ATen's ``brgemm``, like the template's other product.
3. The template's maximum drops NaN, and so does its fast exponential: a NaN in a query or key gives finite numbers.
   The maximum propagates it, and the sum of a row's weights takes it over.
4. With dynamic shapes the template knows no symbolic sizes of the tensors that a mask_mod or score_mod captures: their
   strides come out under names that nobody declares. It passes on the symbols that ``extra_sizevars`` lists, so the
   captures' are added there.
5. It puts its tile sizes into the generated code by replacing text: ``ks3``, say, also at the start of ``ks31``. The
   tile sizes are listed as well, while a mod is generated, which gives them names that no other starts with.
6. It puts the numbers of its buffers into the generated code, so that no two layers of a model have the same kernel and
   each is compiled for itself. With the same numbers in all layers, layers that are alike share one kernel.
7. It can't name a captured size that is computed from others, such as the difference of two lengths. A tensor holds it.

2 to 6 are repaired while our graphs compile, and only then. Torch 2.11 to 2.15 need all of them;
``tests/passes/rewrite/test_cpu_workarounds.py`` says when each can go.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.fx import Node

from flexprefill_compile.torch_internals import (
    compiler_config,
    cpp_flex_attention_template,
    inductor_config,
    is_size_expression,
)

from ..graph.nodes import example_of

_QUERY_KEY_PRODUCT = """
template <bool accum>
inline void {name}(
    const float* A, const float* B, float* C, int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc) {{
  constexpr int64_t TILE = 16;
  static thread_local std::vector<float> transposed;
  transposed.resize(N * K);
  for (int64_t n = 0; n < N; n += TILE) {{
    for (int64_t k = 0; k < K; k += TILE) {{
      const float* source = B + n * ldb + k;
      float* target = transposed.data() + k * N + n;
      if (N - n >= TILE && K - k >= TILE) {{
        at::vec::transpose_mxn<float, TILE, TILE>(source, ldb, target, N);
      }} else {{
        at::vec::transpose_mxn<float>(source, ldb, target, N, std::min(TILE, N - n), std::min(TILE, K - k));
      }}
    }}
  }}
  at::native::cpublas::brgemm(M, N, K, lda, N, ldc, accum, A, transposed.data(), C, false);
}}
"""
# In the kernels that take a row's maximum, and the sum of its weights in place of that maximum.
KEEP_NAN = {"std::max(": "max_propagate_nan<scalar_t>(", "val = tmp_sum;": "val = std::isnan(val) ? val : tmp_sum;"}

_CACHE_TAG = "flexprefill " + hashlib.sha256(f"{_QUERY_KEY_PRODUCT}{KEEP_NAN}".encode()).hexdigest()[:16]


def realize_on_cpu(insert: Callable[..., Node], x: Node, device: torch.device) -> Node:
    """Put a copy behind ``x`` if the device is the CPU; return what to use in place of ``x``.

    Args:
        insert: Adds a call of a function to the graph.
        x: An input or the output of FlexAttention.
        device: Where it lives.
    """
    return insert(torch.ops.flexprefill.realize.default, x) if device.type == "cpu" else x


def name_number_on_cpu(insert: Callable[..., Node], number: Any, device: torch.device) -> Any:
    """Make a captured size that is computed from others a tensor, () int64, if the device is the CPU.

    Args:
        insert: Adds a call of a function to the graph.
        number: What a mask_mod or score_mod captures: a tensor, a size or a constant.
        device: Where the attention runs.
    """
    example = example_of(number)
    if device.type != "cpu" or not is_size_expression(example):
        return number
    return realize_on_cpu(insert, insert(torch.full, (), number, dtype=torch.int64), device)


@contextlib.contextmanager
def repaired_cpu_template() -> Iterator[None]:
    """While active, inductor generates FlexAttention for the CPU without bugs 2 to 6.

    What is compiled meanwhile is cached under a tag of its own: inductor's cache keys see graphs, not templates.
    """
    template = cpp_flex_attention_template().CppFlexAttentionTemplate
    repairs = [
        mock.patch.object(template, name, repair(getattr(template, name))) for name, repair in TEMPLATE_REPAIRS.items()
    ]
    with contextlib.ExitStack() as stack:
        for patch in repairs:
            stack.enter_context(patch)
        stack.enter_context(compiler_config.patch(cache_key_tag=f"{compiler_config.cache_key_tag} {_CACHE_TAG}"))
        yield


def _multiply_fast(define_products: Callable[[Any, str], str]) -> Callable[[Any, str], str]:
    """Repair 2. The products of all layers are alike, and slow to write: they are kept."""
    sources: dict[object, str] = {}

    def define(self: Any, kernel_name: str) -> str:
        kind = (kernel_name, self.input_dtype, self.accumulate_dtype, inductor_config.cpp.simdlen)
        if kind not in sources:
            sources[kind] = write(self, kernel_name)
        return sources[kind]

    def write(self: Any, kernel_name: str) -> str:
        source = define_products(self, kernel_name)
        if self.input_dtype != torch.float32:
            return source
        slow = f"{kernel_name}_kernel_micro_gemm_transpose_b"
        return source.replace(slow, f"{slow}_unused") + _QUERY_KEY_PRODUCT.format(name=slow)

    return define


def _keep_nan(define_softmax: Callable[[Any, str], str]) -> Callable[[Any, str], str]:
    """Repair 3."""

    def define(self: Any, kernel_name: str) -> str:
        source = define_softmax(self, kernel_name)
        for text, replacement in KEEP_NAN.items():
            source = source.replace(text, replacement)
        return source

    return define


def _prepare_template(create: Callable[..., None]) -> Callable[..., None]:
    """Repairs 4 and 6."""

    def create_template(self: Any, *args: Any, **keywords: Any) -> None:
        create(self, *args, **keywords)
        # None where there is no such function; else part of the name of a pointer, in a block of its own.
        self.score_buf_idx, self.mask_buf_idx = (x and "0" for x in (self.score_buf_idx, self.mask_buf_idx))
        captures = [x for x in self.kernel_input_name_to_buffer.values() if hasattr(x, "get_stride")]
        sizes = [size for capture in captures for size in (*capture.get_size(), *capture.get_stride())]
        # Sizes that turned out equal have one symbol in what is generated, but each its own in the captures' shapes.
        simplify = cpp_flex_attention_template().V.graph.sizevars.simplify
        symbols = {s for size in sizes for form in (size, simplify(size)) for s in getattr(form, "free_symbols", ())}
        self.extra_sizevars += sorted(symbols - {*self.extra_sizevars}, key=str)

    return create_template


def _name_tile_sizes(generate: Callable[..., str]) -> Callable[..., str]:
    """Repair 5."""

    def generate_mod(self: Any, *args: Any, **keywords: Any) -> str:
        with mock.patch.object(self, "extra_sizevars", [*self.extra_sizevars, *self.block_vars]):
            return generate(self, *args, **keywords)

    return generate_mod


# By the method of inductor's template.
TEMPLATE_REPAIRS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "micro_gemm_define": _multiply_fast,
    "codegen_softmax_fusion": _keep_nan,
    "__init__": _prepare_template,
    "modification": _name_tile_sizes,
}
