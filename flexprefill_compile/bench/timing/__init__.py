"""Clocks, and what is timed beside sparse prefill: dense attention, and the speeds of the device itself."""
