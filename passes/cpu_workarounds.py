"""Ways around bugs of inductor's FlexAttention on the CPU, all in one place. The GPU path uses none of this.

1. A query or key that is a view of a Linear's output fails to lower (on 2.11, query and key that are views of one), and
   so does a pointwise consumer of the output, which inductor tries to fuse into the C++ template. The op
   ``flexprefill::realize``, a contiguous copy that inductor can't see through, parts the template from its neighbours.
2. For float32 the C++ template multiplies queries by keys one score at a time, so slowly that dense attention wins.
   That product becomes a transposition and a call of ATen's ``brgemm``, like the template's other product.
3. The template's maximum drops NaN, and so does its fast exponential: a NaN in a query or key gives finite numbers.
   The maximum propagates it, and the sum of a row's weights takes it over.

2 and 3 are repaired while our graphs compile, and only then. Checked on torch 2.11 to 2.14;
``tests/test_cpu_workarounds.py`` says when each can go.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.fx import Node

from flexprefill_compile.torch_internals import compiler_config, cpp_flex_attention_template

QUERY_KEY_PRODUCT = """
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

CACHE_TAG = "flexprefill " + hashlib.sha256(f"{QUERY_KEY_PRODUCT}{KEEP_NAN}".encode()).hexdigest()[:16]


def realize_on_cpu(insert: Callable[..., Node], x: Node, device: torch.device) -> Node:
    """Put a copy behind ``x`` if the device is the CPU; return what to use in place of ``x``.

    Args:
        insert: Adds a call of a function to the graph.
        x: An input or the output of FlexAttention.
        device: Where it lives.
    """
    return insert(torch.ops.flexprefill.realize.default, x) if device.type == "cpu" else x


@contextlib.contextmanager
def repaired_cpu_template() -> Iterator[None]:
    """While active, inductor generates FlexAttention for the CPU without bugs 2 and 3.

    What is compiled meanwhile is cached under a tag of its own: inductor's cache keys see graphs, not templates.
    """
    template = cpp_flex_attention_template().CppFlexAttentionTemplate
    define_products = template.micro_gemm_define
    define_softmax = template.codegen_softmax_fusion

    def define_fast_products(self: Any, kernel_name: str) -> str:
        source: str = define_products(self, kernel_name)
        if self.input_dtype != torch.float32:
            return source
        slow = f"{kernel_name}_kernel_micro_gemm_transpose_b"
        return source.replace(slow, f"{slow}_unused") + QUERY_KEY_PRODUCT.format(name=slow)

    def define_softmax_with_nan(self: Any, kernel_name: str) -> str:
        source: str = define_softmax(self, kernel_name)
        for text, replacement in KEEP_NAN.items():
            source = source.replace(text, replacement)
        return source

    tag = f"{compiler_config.cache_key_tag} {CACHE_TAG}"
    with (
        mock.patch.object(template, "micro_gemm_define", define_fast_products),
        mock.patch.object(template, "codegen_softmax_fusion", define_softmax_with_nan),
        compiler_config.patch(cache_key_tag=tag),
    ):
        yield
