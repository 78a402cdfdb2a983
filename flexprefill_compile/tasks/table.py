"""The tasks by name, and their samples by seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from ..errors import UsageError
from .encoder import Encoder
from .kinds.copying import create_copy
from .kinds.multi_key import create_multi_key
from .kinds.needle import create_needle
from .kinds.texts import create_code, create_prose
from .kinds.variables import create_variables
from .kinds.word_count import create_word_count
from .sample import ANSWER_ROOM, PromptTooShortError, Request, Sample, Task, check_answer

TASKS: dict[str, Task] = {
    "needle": create_needle,
    "multi_key": create_multi_key,
    "variables": create_variables,
    "copy": create_copy,
    "word_count": create_word_count,
    "prose": create_prose,
    "code": create_code,
}
TEXTS = ("prose", "code")


def check_tasks(names: Iterable[str]) -> None:
    """Raise if a task is unknown.

    Raises:
        UsageError: Names the task and those there are.
    """
    for name in names:
        if name not in TASKS:
            raise UsageError(f"task must be one of {', '.join(TASKS)}, got {name!r}")


def create_samples(
    name: str, encoder: Encoder, length: int, count: int, seed: int, note: Callable[[], object] = lambda: None
) -> list[Sample]:
    """Make the samples of a task; the same arguments make the same samples.

    Args:
        name: A name of ``TASKS``.
        encoder: The model's tokenizer.
        length: Tokens of prompt and answer together, at most: the prompt has exactly ``ANSWER_ROOM`` fewer.
        count: How many.
        seed: Where chance starts.
        note: Called after each.

    Raises:
        UsageError: The length is less than the task needs, or a text or tokenizer can't serve it.
    """
    samples = []
    for index in range(count):
        chance = random.Random(f"{name} {length} {seed} {index}")
        request = Request(encoder, length - ANSWER_ROOM, chance, index, count)
        try:
            samples.append(check_answer(TASKS[name](request)))
        except PromptTooShortError as error:
            needed = error.num_tokens + ANSWER_ROOM
            raise UsageError(f"length must be at least {needed} tokens for the task {name}, got {length}") from None
        note()
    return samples
