"""The campaign: attention as users write it, drawn from a grammar, compiled, and compared with eager."""
