"""Word counting: name the most frequent word of a long list. The answer stands in no single place. As in RULER."""

from __future__ import annotations

import random
from functools import partial

from ..sample import Request, Sample, hide_in_filler
from .filler import choose_words

_NUM_OTHERS = 24
SHARE = 0.25


def create_word_count(request: Request) -> Sample:
    """Write a list in which one word has a quarter of all places, and 24 others share the rest."""
    most_frequent, *others = choose_words(request.random, _NUM_OTHERS + 1)
    return hide_in_filler(
        request,
        opening="Below is a list of words. One of them stands there far more often than the others.\n\n",
        facts=[],
        question="\n\nQuestion: Which word is the most frequent of the list?\nAnswer: The most frequent word is",
        answer=f" {most_frequent}",
        depth=None,
        filler=partial(draw_words, most_frequent=most_frequent, others=others),
    )


def draw_words(chance: random.Random, count: int, *, most_frequent: str, others: list[str]) -> list[str]:
    """Return words, each with the blank before it; in every four in a row one is the most frequent word."""
    words: list[str] = []
    group = round(1 / SHARE)
    while len(words) < count:
        drawn = [most_frequent, *(chance.choice(others) for _ in range(group - 1))]
        chance.shuffle(drawn)
        words += drawn
    return [f" {word}" for word in words]
