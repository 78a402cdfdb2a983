"""A Hugging Face model: prefill sparse, decode dense and compiled once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.torch_version import TorchVersion
from transformers import LlamaConfig, LlamaForCausalLM

from flexprefill_compile import SkipReason
from flexprefill_compile.backend import FlexPrefillBackend

pytestmark = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.12", reason="before, transformers passes an explicit mask when compiled"
)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def test_generate_prefills_sparse_and_does_not_recompile_per_step(model: LlamaForCausalLM) -> None:
    prompt = torch.randint(1, 128, (1, 150))

    def generate(num_tokens: int) -> Tensor:
        return model.generate(prompt, max_new_tokens=num_tokens, do_sample=False)

    expected = generate(12)
    backend = FlexPrefillBackend()
    model.compile(backend=backend, options={"gamma": 1.0, "block_size": 32, "min_length": 64})
    try:
        assert torch.equal(generate(4), expected[:, :154])
        num_graphs = counters["stats"]["unique_graphs"]
        assert torch.equal(generate(12), expected)
    finally:
        model._compiled_call_impl = None
    assert counters["stats"]["unique_graphs"] == num_graphs, "a decode step compiled"
    prefill, decode = backend.report.sites[:2], backend.report.sites[2:]
    assert [site.name for site in prefill] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert all(site.rewritten for site in prefill)
    assert {site.reason for site in decode} == {SkipReason.DECODE}


def test_lengths_in_any_order_make_two_graphs(model: LlamaForCausalLM) -> None:
    backend = FlexPrefillBackend()
    compiled = torch.compile(
        model, backend=backend, dynamic=True, options={"gamma": 1.0, "block_size": 32, "min_length": 150}
    )
    with torch.no_grad():
        for length in (333, 100, 150, 149, 500):
            prompt = torch.randint(1, 128, (2, length))
            actual = compiled(prompt, use_cache=True).logits
            torch.testing.assert_close(actual, model(prompt, use_cache=True).logits)
    assert [site.rewritten for site in backend.report.sites] == [True, True, False, False]
