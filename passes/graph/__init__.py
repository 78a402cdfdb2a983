"""Read an FX graph: what a node does, what computes a value. Knows nothing of attention."""
