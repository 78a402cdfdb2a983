"""From a mask that a graph computes to a formula of one query and one key. Never changes the graph."""
