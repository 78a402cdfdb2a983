"""Random prompts for a soak: their lengths, batches, padding and chunks."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

LONGEST_RUN = 128
FEWEST_IN_HALVES = 512
# Lengths of a chunk that get graphs of their own: a token, fewer than a block, a short prompt, a long one.
KINDS_OF_CHUNKS = ((1, 1), (2, 127), (128, 255), (256, 2048))
HOW_OFTEN = (1, 1, 1, 3)
MOST_CHUNKS = 3


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt to run.

    Attributes:
        tokens: (B, S) int64.
        mask: (B, S) int64, 1 at tokens and 0 at padding; None is no mask.
        chunks: Lengths of the pieces that it comes in; their sum is S.
    """

    tokens: Tensor
    mask: Tensor | None
    chunks: tuple[int, ...]

    @property
    def is_token(self) -> Tensor:
        """(B, S) bool, whether it is not padding."""
        return torch.ones_like(self.tokens, dtype=torch.bool) if self.mask is None else self.mask.bool()

    def __str__(self) -> str:
        """Return its sizes."""
        padding = "no mask" if self.mask is None else f"{(self.mask == 0).sum(1).tolist()} of padding"
        return f"batch {self.tokens.shape[0]}, chunks {self.chunks}, {padding}"


def draw_prompts(seed: int, device: str, lengths: Sequence[int] | None) -> Iterator[Prompt]:
    """Draw prompts for ever: of chunks of each kind, or of these lengths, whole or in halves."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    while True:
        batch = draw.choice((1, 1, 2, 3) if lengths is None else (1, 2))
        chunks = _draw_chunks(draw) if lengths is None else _draw_halves(draw, draw.choice(lengths))
        length = sum(chunks)
        tokens = torch.stack([_draw_runs(length, generator) for _ in range(batch)]).to(device)
        yield Prompt(tokens, _draw_mask(draw, batch, length, device), chunks)


def _draw_runs(length: int, generator: torch.Generator) -> Tensor:
    """Draw tokens that each come many times in a row, (S,): what they attend to is found in few blocks."""
    tokens = torch.randint(256, (length,), generator=generator)
    counts = torch.randint(1, LONGEST_RUN + 1, (length,), generator=generator)
    return tokens.repeat_interleave(counts)[:length]


def _draw_mask(draw: random.Random, batch: int, length: int, device: str) -> Tensor | None:
    side = draw.choice(("none", "left", "right"))
    if side == "none":
        return None
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in mask:
        padding = draw.randint(0, length // 2)
        row[:padding] = 0
        if side == "right":
            row.copy_(row.flip(0))
    return mask.to(device)


def _draw_chunks(draw: random.Random) -> tuple[int, ...]:
    kinds = draw.choices(KINDS_OF_CHUNKS, HOW_OFTEN, k=draw.randint(1, MOST_CHUNKS))
    return tuple(draw.randint(*kind) for kind in kinds)


def _draw_halves(draw: random.Random, length: int) -> tuple[int, ...]:
    return (length,) if length < FEWEST_IN_HALVES or draw.random() < 0.5 else (length // 2, length - length // 2)


def prefill(model: nn.Module | Callable[..., Any], prompt: Prompt) -> Tensor:
    """Return the logits of a prompt, (B, S, vocabulary), from its chunks.

    They are tensors of their own, as a server's are: of a slice, dynamo guards how its strides relate to its sizes.
    """
    torch.compiler.cudagraph_mark_step_begin()
    cache, stop, logits = DynamicCache(), 0, []
    for length in prompt.chunks:
        start, stop = stop, stop + length
        tokens = prompt.tokens[:, start:stop].contiguous()
        mask = None if prompt.mask is None else prompt.mask[:, :stop].contiguous()
        output = model(tokens, attention_mask=mask, past_key_values=cache, use_cache=True)
        logits.append(output.logits.clone())
    return torch.cat(logits, 1)
