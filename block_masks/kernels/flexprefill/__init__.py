"""Selection by Triton kernels, from inputs or block scores to tables: one kernel and its launch a file."""
