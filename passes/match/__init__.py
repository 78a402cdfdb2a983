"""From a node to an attention site, or the reason why it stays dense. Never changes the graph."""
