"""The cheapest settings by layer that keep a bound on loss. Law: what is returned was measured as a whole."""
