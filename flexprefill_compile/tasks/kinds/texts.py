"""Real text and real code that come with Python: the model's loss on their last tokens, given all before."""

from __future__ import annotations

import functools
import importlib
import random
import sysconfig
from pathlib import Path

from ...errors import UsageError
from ..sample import PromptTooShortError, Request, Sample

# Characters to tokenise for each token wanted, at first; doubled while that is too few.
_CHARACTERS_A_TOKEN = 5


def create_prose(request: Request) -> Sample:
    """Take a stretch of Python's language reference; the samples' starts are spread evenly over it."""
    text = _read_reference()
    start = int(len(text) * (request.index + request.random.random()) / (request.count + 1))
    start = text.find("\n\n", start) + 2
    return _take_text(request, text[start:] + text[:start])


def create_code(request: Request) -> Sample:
    """Take the source of modules of Python's standard library, in an order drawn by chance."""
    return _take_text(request, _read_sources(request.random, _CHARACTERS_A_TOKEN * 4 * request.prompt_tokens))


def _take_text(request: Request, text: str) -> Sample:
    """Return the start of a text, of exactly the tokens wanted.

    Raises:
        PromptTooShortError: The tokenizer's special tokens alone are longer.
        UsageError: The text has not so many tokens.
    """
    encoder = request.encoder
    room = request.prompt_tokens - len(encoder.start)
    if room < 1:
        raise PromptTooShortError(len(encoder.start) + 1)
    num_characters = room * _CHARACTERS_A_TOKEN
    while len(tokens := encoder.encode(text[:num_characters])) < room:
        if num_characters >= len(text):
            raise UsageError(f"the text has {len(tokens)} tokens, fewer than the {room} that are needed")
        num_characters *= 2
    return Sample((*encoder.start, *tokens[:room]))


@functools.cache
def _read_reference() -> str:
    """Return Python's language reference, as ``help()`` shows it.

    Raises:
        UsageError: This Python comes without it.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:
        raise UsageError("the task prose needs Python's pydoc_data, which this Python comes without") from None
    return "\n\n".join(topics[name] for name in sorted(topics))


@functools.cache
def _find_sources() -> tuple[Path, ...]:
    """Return the files of the standard library's own modules, by name.

    Raises:
        UsageError: This Python comes without their source.
    """
    files = tuple(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    if not files:
        raise UsageError("the task code needs the source of Python's standard library, which this Python comes without")
    return files


def _read_sources(chance: random.Random, num_characters: int) -> str:
    """Return the sources of modules, one after another, until there are so many characters or no more modules."""
    files = list(_find_sources())
    chance.shuffle(files)
    sources: list[str] = []
    while files and sum(map(len, sources)) < num_characters:
        sources.append(files.pop().read_text(encoding="utf-8", errors="replace"))
    return "\n\n".join(sources)
