"""Read an FX graph, and trace code into it. Knows nothing of attention."""
