"""From queries and keys to scores of blocks: one estimator a file, one row each in the table."""
