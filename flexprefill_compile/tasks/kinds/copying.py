"""Copying: a list of words from somewhere in a long text has to be written again at its end, word for word."""

from __future__ import annotations

from ..sample import Request, Sample, hide_in_filler
from .filler import choose_words

_NUM_WORDS = 20
_NUM_GIVEN = 8


def create_copy(request: Request) -> Sample:
    """Hide a list of twenty words, and repeat its first eight; the answer is the rest."""
    name, *words = choose_words(request.random, _NUM_WORDS + 1)
    return hide_in_filler(
        request,
        opening="Somewhere in the text below is a list of words. Remember it word for word.\n\n",
        facts=[(request.depth, f"\nThe list of the {name}: {' '.join(words)}\n")],
        question=f"\n\nHere it is again, word for word.\nThe list of the {name}: {' '.join(words[:_NUM_GIVEN])}",
        answer=f" {' '.join(words[_NUM_GIVEN:])}",
        depth=request.depth,
    )
