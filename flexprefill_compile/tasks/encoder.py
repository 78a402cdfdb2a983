"""A tokenizer as the tasks use it: pieces of text one by one, no special tokens but those a text starts with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Encoder:
    """Text into tokens.

    Attributes:
        start: The special tokens that the tokenizer puts before a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Take a Hugging Face tokenizer."""
        self._tokenizer = tokenizer
        plain = self.encode("a")
        whole = list(tokenizer("a").input_ids)
        first = next((place for place in range(len(whole)) if whole[place : place + len(plain)] == plain), 0)
        self.start: tuple[int, ...] = tuple(whole[:first])

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without special ones."""
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def encode_each(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, all in one call: much faster than one by one."""
        if not texts:
            return []
        different = list(dict.fromkeys(texts))
        tokens = self._tokenizer(different, add_special_tokens=False, verbose=False).input_ids
        known = dict(zip(different, tokens, strict=True))
        return [known[text] for text in texts]

    def split_answer(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a question and of the answer that follows it, as they are when written in one go.

        A tokenizer may merge letters across the seam; then the seam moves back to where both agree.
        """
        alone, whole = self.encode(question), self.encode(question + answer)
        seam = 0
        while seam < min(len(alone), len(whole) - 1) and alone[seam] == whole[seam]:
            seam += 1
        return whole[:seam], whole[seam:]
