"""Variable tracking: a value is handed from variable to variable through a long text. In the manner of RULER."""

from __future__ import annotations

import random

from ..sample import Request, Sample, hide_in_filler
from .filler import choose_number

_NUM_CHAINS = 2
_CHAIN_LENGTH = 3
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


def create_variables(request: Request) -> Sample:
    """Hide two chains of assignments, and ask for the value of the last variable of one."""
    chance = request.random
    names = _choose_names(chance, _NUM_CHAINS * _CHAIN_LENGTH)
    numbers = [choose_number(chance) for _ in range(_NUM_CHAINS)]
    facts: list[tuple[float, str]] = []
    for chain, number in enumerate(numbers):
        members = names[chain * _CHAIN_LENGTH : (chain + 1) * _CHAIN_LENGTH]
        depths = sorted(chance.random() for _ in members)
        facts += [
            (depth, f"\nVariable {name} = {value}\n")
            for depth, name, value in zip(depths, members, (number, *members), strict=False)
        ]
    last = names[_CHAIN_LENGTH - 1]
    return hide_in_filler(
        request,
        opening="Variables are set in the text below, to a number or to another variable. Keep track of them.\n\n",
        facts=facts,
        question=f"\n\nQuestion: What number is variable {last}?\nAnswer: The number that variable {last} is set to is",
        answer=f" {numbers[0]}",
        depth=facts[0][0],
    )


def _choose_names(chance: random.Random, count: int) -> list[str]:
    """Return different names of three letters."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(chance.choice(_LETTERS) for _ in range(3))] = None
    return list(names)
