"""Attention pooled by block, by Triton kernels that write no scores: what ``estimators/block_shares.py`` computes."""
