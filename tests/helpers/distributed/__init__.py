"""Processes that are ranks, and what they run."""
