"""What the benchmarks attend over."""
