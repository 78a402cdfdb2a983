"""From a mask to a formula of one query and one key, or the reason why there is none. Never changes the graph."""
