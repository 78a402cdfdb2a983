"""The estimator ``pooled`` as Triton kernels, two causal and two masked; what plain PyTorch shares stands here."""

from __future__ import annotations

QUERY_STRIDE = 8  # tokens for each query that is looked at, the middle one of them
POOL_TOKENS = 32  # keys a mean; a smaller block is one mean
