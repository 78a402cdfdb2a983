"""Block shares by Triton kernels: the same as ``estimators/block_shares.py``, and no scores are written."""
