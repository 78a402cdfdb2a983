"""What a task hands to the model: a prompt, the right answer, and where in the prompt it stands."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

from ..errors import UsageError
from .encoder import Encoder
from .kinds.filler import Filler, write_sentences

# Tokens of a sample's length that are kept for its answer, the same for all tasks: all prompts of a length are equally
# long, and one compiled graph serves them.
ANSWER_ROOM = 128


class PromptTooShortError(Exception):
    """A task's own words alone are longer than the prompt; the argument is how many tokens the prompt must have."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(num_tokens)
        self.num_tokens = num_tokens


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question to a model.

    Attributes:
        prompt: Tokens to prefill.
        answer: Tokens that should follow; empty where the prompt's own last tokens are what is scored.
        depth: Where the answer stands in the prompt: 0 is its start, 1 its end. None where it is everywhere.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...] = ()
    depth: float | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of a task: one sample.

    Attributes:
        encoder: Turns text into tokens.
        prompt_tokens: Tokens that the prompt has.
        random: Where all chance comes from.
        index: Which sample of how many this is.
        count: How many samples are asked for.
    """

    encoder: Encoder
    prompt_tokens: int
    random: random.Random
    index: int = 0
    count: int = 1

    @property
    def depth(self) -> float:
        """The depth of this sample, when all samples together are spread evenly from 0 to 1."""
        return self.index / (self.count - 1) if self.count > 1 else 0.5


Task = Callable[[Request], Sample]


def hide_in_filler(
    request: Request,
    *,
    opening: str,
    facts: Sequence[tuple[float, str]],
    question: str,
    answer: str,
    depth: float | None,
    filler: Filler = write_sentences,
) -> Sample:
    """Put facts at given depths of a text that has nothing to do with them, and a question at its end.

    Args:
        request: What is asked for.
        opening: The first words.
        facts: Depth in the filler, 0 to 1, and text of each fact. Each stands between two whole pieces of filler.
        question: The last words of the prompt; the answer follows.
        answer: What should follow, from its first blank on.
        depth: What to note as the answer's depth.
        filler: Writes pieces of text.

    Raises:
        PromptTooShortError: All this is longer than the prompt.
    """
    encoder = request.encoder
    start = [*encoder.start, *encoder.encode(opening)]
    facts = sorted(facts, key=lambda fact: fact[0])
    inserts = encoder.encode_each([text for _, text in facts])
    end, right = encoder.split_answer(question, answer)
    room = request.prompt_tokens - len(start) - sum(map(len, inserts)) - len(end)
    if room < 0:
        raise PromptTooShortError(request.prompt_tokens - room)
    pieces = fill(request, room, filler)
    places = [_place_at_depth(pieces, depth) for depth, _ in facts]
    tokens = start
    for number in range(len(pieces) + 1):
        for place, insert in zip(places, inserts, strict=True):
            if place == number:
                tokens.extend(insert)
        if number < len(pieces):
            tokens.extend(pieces[number])
    return Sample((*tokens, *end), tuple(right), depth)


def fill(request: Request, num_tokens: int, filler: Filler) -> list[list[int]]:
    """Return pieces of filler of exactly so many tokens together; the first is cut at its start to fit."""
    pieces: list[list[int]] = []
    missing = num_tokens
    while missing > 0:
        for piece in request.encoder.encode_each(filler(request.random, missing // 8 + 1)):
            if missing > 0:
                pieces.append(piece[-missing:])
                missing -= len(pieces[-1])
    return pieces[::-1]


def _place_at_depth(pieces: Sequence[Sequence[int]], depth: float) -> int:
    """Return how many whole pieces stand before a depth: the boundary between pieces that is nearest to it."""
    wanted = depth * sum(map(len, pieces))
    best, best_distance, passed = 0, wanted, 0
    for number, piece in enumerate(pieces, 1):
        passed += len(piece)
        if abs(passed - wanted) < best_distance:
            best, best_distance = number, abs(passed - wanted)
    return best


def check_answer(sample: Sample) -> Sample:
    """Return a sample whose answer fits its room.

    Raises:
        UsageError: It doesn't: the tokenizer takes many tokens for a word.
    """
    if len(sample.answer) > ANSWER_ROOM:
        raise UsageError(f"an answer must be at most {ANSWER_ROOM} tokens of the model, got {len(sample.answer)}")
    return sample
