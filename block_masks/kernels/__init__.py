"""Triton kernels: each stands beside its launch, computes what plain PyTorch computes, and imports no estimator."""
