"""Clocks, dense attention, the speeds of the device. Law: a time is a mean of warm calls, in milliseconds."""
