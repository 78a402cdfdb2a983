"""What the benchmarks attend over. Law: one file a kind, each makes (query, key, value), the same for the same seed."""
