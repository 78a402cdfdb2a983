"""From a mask to a formula of one query and one key, or the reason why attention stays dense. Never changes the graph."""
