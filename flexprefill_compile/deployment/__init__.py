"""Ways to get a compiled model elsewhere or sooner: exported programs. Nothing here changes what a graph computes."""
