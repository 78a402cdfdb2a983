"""Selection by pooled keys in two launches: one reads the keys, one scores, chooses and packs."""
