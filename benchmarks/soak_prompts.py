"""Random prompts for a soak: their lengths, batches, padding and chunks."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

SHORTEST, LONGEST, LONGEST_RUN = 16, 2048, 128
FEWEST_IN_HALVES = 512


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
    """Draw prompts for ever: of any length up to ``LONGEST``, or of these lengths."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    while True:
        batch = draw.choice((1, 1, 2, 3) if lengths is None else (1, 2))
        length = draw.choice(lengths) if lengths else draw.randint(SHORTEST, LONGEST)
        tokens = torch.stack([_draw_runs(length, generator) for _ in range(batch)]).to(device)
        yield Prompt(tokens, _draw_mask(draw, batch, length, device), _draw_chunks(draw, length, is_free=not lengths))


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
        padding = draw.randrange(length // 2)
        row[:padding] = 0
        if side == "right":
            row.copy_(row.flip(0))
    return mask.to(device)


def _draw_chunks(draw: random.Random, length: int, *, is_free: bool) -> tuple[int, ...]:
    """Draw up to three chunks; if not free, halves or none."""
    if not is_free:
        return (length,) if length < FEWEST_IN_HALVES or draw.random() < 0.5 else (length // 2, length - length // 2)
    ends = sorted({*draw.sample(range(1, length), draw.randrange(3)), length})
    return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))


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
