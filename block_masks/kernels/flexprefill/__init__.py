"""The paper's estimator as Triton kernels."""
