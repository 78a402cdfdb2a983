"""What a program on many ranks calls: cut a prompt, and gather what is left of it. Knows nothing of graphs."""

from .prompt import broadcast_last, gather_cache, take_stretch

__all__ = ["broadcast_last", "gather_cache", "take_stretch"]
