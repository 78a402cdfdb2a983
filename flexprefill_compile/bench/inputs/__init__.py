"""What the benchmarks attend over: queries, keys and values, one file a kind."""
