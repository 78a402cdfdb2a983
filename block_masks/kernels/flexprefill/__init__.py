"""Selection by Triton kernels, from inputs or an estimator's scores to tables: each kernel stands beside its launch."""
