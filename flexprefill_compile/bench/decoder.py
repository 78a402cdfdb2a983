"""A Llama-shaped decoder with random weights: what a language model computes in its prefill, and no more."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .inputs.rotary import rotate
from .timing.dense_attention import attend

Cache = list[tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """The sizes of a decoder; those of Llama-3.1-8B by default."""

    layers: int = 32
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256

    @property
    def head_dim(self) -> int:
        """Of queries, keys and values."""
        return self.hidden // self.heads


class Layer(nn.Module):
    """Attention with rotary positions and shared key heads, then a gated feed-forward net, each behind a norm."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.attention_norm, self.forward_norm = nn.RMSNorm(shape.hidden), nn.RMSNorm(shape.hidden)
        self.splits = [shape.heads * shape.head_dim, *[shape.kv_heads * shape.head_dim] * 2]
        self.project_in = nn.Linear(shape.hidden, sum(self.splits), bias=False)
        self.project_out = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.gate_and_up = nn.Linear(shape.hidden, 2 * shape.intermediate, bias=False)
        self.down = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the new state (B, S, hidden), and what a cache keeps: keys and values, (B, Hkv, S, D)."""
        parts = self.project_in(self.attention_norm(x)).split(self.splits, dim=-1)
        query, key, value = (part.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2) for part in parts)
        query, key = (rotate(part.float(), position).to(x.dtype) for part in (query, key))
        x = x + self.project_out(attend(query, key, value).transpose(1, 2).flatten(-2))
        gate, up = self.gate_and_up(self.forward_norm(x)).chunk(2, dim=-1)
        # A view of its part would keep the whole projection alive.
        return x + self.down(F.silu(gate) * up), key, value.contiguous()


class Decoder(nn.Module):
    """Embedding, layers, and the logits of the last token."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)

    def forward(self, tokens: Tensor, run_layer: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Cache]:
        """Prefill a prompt.

        Args:
            tokens: (B, S) int64.
            run_layer: Calls a layer with its arguments. Compiled, it is compiled once for all layers.

        Returns:
            The next token, (B,), and the cache.
        """
        x = self.embedding(tokens)
        position = torch.arange(tokens.shape[1], device=tokens.device)
        cache: Cache = []
        for layer in self.layers:
            x, key, value = run_layer(layer, x, position)
            cache.append((key, value))
        return self.head(self.norm(x[:, -1])).argmax(-1), cache


def create_decoder(shape: DecoderShape, device: str, dtype: torch.dtype) -> Decoder:
    """Make a decoder with normal random weights of standard deviation 0.02."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = Decoder(shape)
        model.to_empty(device=device)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(1)
    return model.eval()


def run_layer(layer: Layer, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Call a layer."""
    state, key, value = layer(x, position)
    return state, key, value
