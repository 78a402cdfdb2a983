"""The estimator ``pooled`` as two Triton kernels; what they have in common with plain PyTorch stands here."""

from __future__ import annotations

QUERY_STRIDE = 8  # tokens for each query that is looked at, the middle one of them
POOL_TOKENS = 32  # keys a mean; a smaller block is one mean
