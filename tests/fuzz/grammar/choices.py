"""Where the grammar's choices come from: a seed, hypothesis, or the record of an earlier draw."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
Draw = Callable[[int], int]


class Choices:
    """Makes the choices of the grammar and records them. The first option of each choice is the simplest.

    Attributes:
        tape: The number of the option that each choice took.
    """

    def __init__(self, draw: Draw) -> None:
        """Take a function that returns a number below the given one."""
        self._draw = draw
        self.tape: list[int] = []

    def pick(self, options: Sequence[T]) -> T:
        """Choose one of several options."""
        self.tape.append(self._draw(len(options)))
        return options[self.tape[-1]]

    def chance(self, percent: int) -> bool:
        """Choose True in about so many of 100 draws; False is the simpler option."""
        self.tape.append(self._draw(100))
        return self.tape[-1] >= 100 - percent

    def between(self, least: int, most: int) -> int:
        """Choose a number; the least is the simplest."""
        return self.pick(range(least, most + 1))


def seeded(seed: int, number: int) -> Choices:
    """Return the choices of one case of a campaign."""
    return Choices(random.Random(f"{seed}:{number}").randrange)


def replayed(tape: Sequence[int]) -> Choices:
    """Return the choices of a tape; behind its end, the simplest ones."""
    rest = iter(tape)
    return Choices(lambda below: min(next(rest, 0), below - 1))


def shrink(tape: Sequence[int], fails: Callable[[list[int]], bool], most_tries: int = 60) -> list[int]:
    """Return a simpler tape that still fails: numbers become 0, then half, from the last choice to the first.

    Args:
        tape: One that fails.
        fails: Whether a tape fails in the same way.
        most_tries: How often ``fails`` is asked.
    """
    best = list(tape)
    tries = 0
    for value_of in (lambda _: 0, lambda x: x // 2):
        width = max(1, len(best) // 4)
        while width >= 1 and tries < most_tries:
            for start in range(len(best) - width, -1, -width):
                part = best[start : start + width]
                simpler = [*best[:start], *map(value_of, part), *best[start + width :]]
                if simpler != best and tries < most_tries:
                    tries += 1
                    best = simpler if fails(simpler) else best
            width //= 2
    return best
