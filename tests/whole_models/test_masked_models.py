"""Padded, packed, windowed and chunked prefill of whole models: right, each prompt by itself, and never S x S."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.checked_attention import without_code_generation
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.block_masks import record_densities
from flexprefill_compile.passes.sparse_prefill import SparsePrefillPass
from flexprefill_compile.settings.config import SparsePrefillConfig

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,  # at the default, attention is nearly uniform and tells little
}
BLOCK = 32
OPTIONS: dict[str, Any] = {
    "block_size": BLOCK,
    "min_budget": 0,
    "min_length": 64,
    "on_skip": "raise",
    "check_masks": True,
}


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def mistral() -> nn.Module:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=100)).eval()


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(1))


def compiled(model: nn.Module, *, dynamic: bool | None = None, **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend=FlexPrefillBackend(), options=OPTIONS | options, dynamic=dynamic)


def prefill_in_chunks(call: Callable[..., Any], config: Any, ids: Tensor, num_chunks: int) -> Tensor:
    cache = DynamicCache(config=config)
    chunks = ids.tensor_split(num_chunks, dim=1)
    return torch.cat([call(chunk, past_key_values=cache).logits for chunk in chunks], dim=1)


# No tensor of S x S


def padded_llama(call: Callable[..., Any]) -> Tensor:
    mask = torch.ones(2, 512, dtype=torch.long)
    mask[0, :100] = 0
    return call(tokens(2, 512), attention_mask=mask).logits


def plain_mistral(call: Callable[..., Any]) -> Tensor:
    return call(tokens(2, 512), use_cache=False).logits


def packed_llama(call: Callable[..., Any]) -> Tensor:
    position_ids = torch.cat([torch.arange(200), torch.arange(312)]).expand(2, -1)
    return call(tokens(2, 512), position_ids=position_ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("make", "prefill"),
    [(llama, padded_llama), (mistral, plain_mistral), (llama, packed_llama), (mistral, padded_llama)],
)
@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_the_final_graph_holds_no_tensor_of_length_squared(
    make: Callable[[], nn.Module], prefill: Callable[..., Tensor], dynamic: bool
) -> None:
    dense, sparse = (largest_tensor(make(), prefill, 512, rewrites=r, dynamic=dynamic) for r in (False, True))
    assert dense >= 512 * 512, "the test sees no masks"
    assert sparse < 512 * 512


@torch.no_grad()
def test_the_final_graph_of_a_chunk_holds_no_tensor_of_length_squared() -> None:
    model = llama()

    def second_chunk(call: Callable[..., Any]) -> Tensor:
        cache = DynamicCache(config=model.config)
        model(tokens(2, 512), past_key_values=cache)
        return call(tokens(2, 512), past_key_values=cache).logits

    dense, sparse = (largest_tensor(model, second_chunk, 1024, rewrites=r, dynamic=False) for r in (False, True))
    assert dense >= 512 * 1024
    assert sparse < 512 * 1024


def largest_tensor(
    model: nn.Module, prefill: Callable[..., Tensor], length: int, *, rewrites: bool, dynamic: bool
) -> int:
    """Return how many elements the largest tensor has in the graphs that inductor would get."""
    sizes: list[int] = []

    def measure(graph_module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        for node in graph_module.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, Tensor) and node.op == "call_function":
                sizes.append(int(value.numel()))
        return graph_module.forward

    def backend(graph_module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        if rewrites:
            rewrite = SparsePrefillPass(SparsePrefillConfig(block_size=BLOCK, min_budget=0, min_length=64), {})
            rewrite(graph_module)
            assert [site.rewritten for site in rewrite.sites] == [True, True], rewrite.sites
        return aot_autograd(fw_compiler=measure, inference_compiler=measure)(graph_module, example_inputs)

    torch._dynamo.reset()
    prefill(torch.compile(model, backend=backend, dynamic=dynamic))
    return max(sizes)


# Each prompt by itself


@pytest.mark.parametrize(
    ("side", "estimator"),
    [("right", "flexprefill"), ("left", "flexprefill"), ("right", "auto"), ("left", "xattention")],
)
@torch.no_grad()
def test_each_prompt_of_a_batch_gets_what_it_gets_alone(side: str, estimator: str) -> None:
    lengths = (224, 160) if side == "left" else (224, 141)  # on the left, padded by whole blocks
    model = llama()
    ids = tokens(2, 224)
    mask = torch.zeros(2, 224, dtype=torch.long)
    places = [slice(224 - n, 224) if side == "left" else slice(0, n) for n in lengths]
    for row, place in enumerate(places):
        mask[row, place] = 1

    with without_code_generation(is_dense=False):
        # Positions as each prompt has them alone.
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        batch = compiled(model, gamma=0.9, estimator=estimator)
        with record_densities() as densities:
            together = batch(ids, attention_mask=mask, position_ids=position_ids).logits
        assert max(density.min().item() for density in densities) < 1
        for row, place in enumerate(places):
            torch._dynamo.reset()
            alone = compiled(model, gamma=0.9, estimator=estimator)(ids[row : row + 1, place]).logits
            torch.testing.assert_close(together[row : row + 1, place], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_by_any_amount_is_dense_at_gamma_1() -> None:
    model = llama()
    mask = torch.ones(2, 200, dtype=torch.long)
    mask[0, :37] = 0
    expected = model(tokens(2, 200), attention_mask=mask).logits
    with without_code_generation():
        actual = compiled(model, gamma=1.0)(tokens(2, 200), attention_mask=mask).logits
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [llama, mistral])
@pytest.mark.parametrize("num_chunks", [2, 3, 7])
@torch.no_grad()
def test_prefill_in_chunks_equals_prefill_in_one(make: Callable[[], nn.Module], num_chunks: int) -> None:
    model = make()
    ids = tokens(2, 500)  # no chunk ends where a block does
    expected = model(ids).logits
    with without_code_generation():
        actual = prefill_in_chunks(compiled(model, gamma=1.0), model.config, ids, num_chunks)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# Through inductor


class Masked(nn.Module):
    """An attention under every kind of capture: per batch and key, a number in a tensor, per head."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor, offset: Tensor, slopes: Tensor) -> Tensor:
        query = torch.arange(q.shape[2])[:, None] + offset
        key = torch.arange(k.shape[2])
        mask = (key <= query) & (key > query - 70) & pad.bool()[:, None, None, :]
        bias = torch.where(mask, 0.0, float("-inf")) + slopes[:, None, None] * (key - query)
        return torch.relu(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True))


@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_captures_of_every_kind_through_inductor(dynamic: bool) -> None:
    call = compiled(Masked(), gamma=1.0, check_masks=True, dynamic=dynamic)
    for length in (100, 131) if dynamic else (100,):
        offset = 40
        q, k, v = (torch.randn(2, h, n, 16) for h, n in ((4, length), (2, length + offset), (2, length + offset)))
        pad = torch.ones(2, length + offset, dtype=torch.long)
        pad[0, :30] = 0
        inputs = (q, k, v, pad, torch.tensor(offset), torch.rand(4))
        torch.testing.assert_close(call(*inputs), Masked()(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_packed", [False, True])
@torch.no_grad()
def test_masked_llama_of_any_length_through_inductor(is_packed: bool) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": 1})).eval()
    call = compiled(model, gamma=1.0, check_masks=False, dynamic=True)
    for number, length in enumerate((150, 211)):
        is_token, arguments = mask_tokens(length, is_packed)
        with torch.compiler.set_stance("default" if number == 0 else "fail_on_recompile"):
            actual = call(tokens(2, length), **arguments).logits
        expected = model(tokens(2, length), **arguments).logits
        torch.testing.assert_close(actual[is_token], expected[is_token], rtol=1e-4, atol=1e-4)


def mask_tokens(length: int, is_packed: bool) -> tuple[Tensor, dict[str, Any]]:
    """Return which tokens are none of padding, and what tells the model so."""
    mask = torch.ones(2, length, dtype=torch.long)
    if is_packed:
        position_ids = torch.cat([torch.arange(70), torch.arange(length - 70)]).expand(2, -1)
        return mask.bool(), {"position_ids": position_ids, "use_cache": False}
    mask[0, :37] = 0
    return mask.bool(), {"attention_mask": mask}
