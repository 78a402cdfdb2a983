"""From queries and keys to the blocks to compute: one estimator a file, one row each in ``table.py``."""
