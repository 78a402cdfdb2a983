"""What a mask proves about blocks: from a mask function to tensors, with no query or key read."""
