"""Attention as code, drawn: sizes, layouts, positions, conditions, masks, forms. Knows nothing of the backend."""
