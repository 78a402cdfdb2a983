"""What sparse prefill loses on a real model, measured, and settings that keep the loss within a bound."""
