"""Multi-key retrieval: many numbers are told, each with a name, and one is asked for. In the manner of RULER."""

from __future__ import annotations

from ..sample import Request, Sample, hide_in_filler
from .filler import choose_number, choose_words

_NUM_KEYS = 8


def create_multi_key(request: Request) -> Sample:
    """Hide a number for each of eight names; the depths of those asked for are spread evenly over the samples."""
    chance = request.random
    names = choose_words(chance, _NUM_KEYS)
    numbers = [choose_number(chance) for _ in names]
    depths = [request.depth, *(chance.random() for _ in names[1:])]
    facts = [
        (depth, f" The secret number of the {name} is {number}.")
        for depth, name, number in zip(depths, names, numbers, strict=True)
    ]
    question = f"\n\nQuestion: What is the secret number of the {names[0]}?"
    return hide_in_filler(
        request,
        opening="Somewhere in the text below some secret numbers are told. Remember them.\n\n",
        facts=facts,
        question=f"{question}\nAnswer: The secret number of the {names[0]} is",
        answer=f" {numbers[0]}",
        depth=request.depth,
    )
