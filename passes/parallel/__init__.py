"""Exchange heads for tokens around each attention, so that every rank attends over the whole prompt. Or refuse."""
