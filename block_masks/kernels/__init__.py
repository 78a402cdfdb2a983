"""Triton kernels, each beside the function that launches it. Plain PyTorch computes the same elsewhere."""
