"""The search for the cheapest settings by layer that keep a model's loss within a bound."""
