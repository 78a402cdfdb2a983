"""Needle: one number is told somewhere in a long text, and asked for at its end. In the manner of RULER, 2404.06654."""

from __future__ import annotations

from ..sample import Request, Sample, hide_in_filler
from .filler import choose_number, choose_words


def create_needle(request: Request) -> Sample:
    """Hide one number; the samples' depths are spread evenly."""
    (name,) = choose_words(request.random, 1)
    number = choose_number(request.random)
    return hide_in_filler(
        request,
        opening="Somewhere in the text below a secret number is told. Remember it.\n\n",
        facts=[(request.depth, f" The secret number of the {name} is {number}.")],
        question=f"\n\nQuestion: What is the secret number of the {name}?\nAnswer: The secret number of the {name} is",
        answer=f" {number}",
        depth=request.depth,
    )
