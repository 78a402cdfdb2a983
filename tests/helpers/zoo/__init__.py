"""A tiny model of every family that transformers has, and what each has to do right."""
