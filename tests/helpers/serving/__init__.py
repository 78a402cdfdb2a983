"""What tests of serving share: engines over a paged cache."""
