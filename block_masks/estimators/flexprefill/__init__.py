"""FlexPrefill (arXiv 2502.20766): one of the paper's algorithms a file, for causal attention and under a mask."""
