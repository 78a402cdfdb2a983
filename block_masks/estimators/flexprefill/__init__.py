"""The paper's estimator, FlexPrefill (arXiv 2502.20766): one algorithm a file."""
