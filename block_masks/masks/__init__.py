"""What a mask proves about blocks: which are full, which are empty, whose tokens count."""
