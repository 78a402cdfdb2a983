"""The attention that Hugging Face models write out is found, and described as what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.graphs import check_site, match_graphs
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from flexprefill_compile.passes.graph.nodes import example_of
from flexprefill_compile.passes.graph.operations import operation
from flexprefill_compile.passes.match.site import AttentionSite, Logits, Masked
from flexprefill_compile.report import Skipped, SkipReason

LENGTH, HEADS = 40, 4
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": HEADS, "vocab_size": 99}
GPT_SIZES = {"n_embd": 64, "n_layer": 2, "n_head": HEADS, "vocab_size": 99, "n_positions": 128}
GQA = SIZES | {"num_key_value_heads": 2, "intermediate_size": 64, "pad_token_id": 0}
ROTARY = GPT_SIZES | {"rotary_dim": 8}
HUGGING_FACE_STEPS = ["matmul", "mul", "add"]

# Model type, what its config takes, heads of key and value, and what the scores go through.
EAGER: list[tuple[str, dict[str, Any], int, list[str]]] = [
    ("llama", GQA, 2, HUGGING_FACE_STEPS),
    ("phi3", GQA, 2, HUGGING_FACE_STEPS),
    ("gemma2", GQA | {"head_dim": 16}, 2, ["matmul", "mul", "truediv", "tanh", "mul", "add"]),
    ("gpt2", GPT_SIZES, HEADS, HUGGING_FACE_STEPS),
    ("gpt_neox", SIZES | {"intermediate_size": 64}, HEADS, HUGGING_FACE_STEPS),
    ("gpt_neo", {"hidden_size": 64, "num_layers": 2, "num_heads": HEADS, "attention_types": [[["global", "local"], 1]]},
     HEADS, ["matmul", "where", "add"]),
    ("gpt_bigcode", GPT_SIZES, 1, HUGGING_FACE_STEPS),
    ("opt", SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 64}, HEADS, HUGGING_FACE_STEPS),
    ("gptj", ROTARY, HEADS, ["matmul", "truediv", "add"]),
    ("codegen", ROTARY, HEADS, ["matmul", "add", "truediv"]),
    ("bloom", SIZES, HEADS, ["baddbmm", "view", "add"]),
    ("mpt", {"d_model": 64, "n_layers": 2, "n_heads": HEADS, "vocab_size": 99}, HEADS,
     ["matmul", "mul", "add", "masked_fill", "float"]),
    ("falcon", SIZES, 1, ["matmul", "itruediv", "add"]),
    ("falcon", SIZES | {"alibi": True}, 1, ["matmul", "view", "add", "imul", "add"]),
    ("xglm", {"d_model": 64, "num_layers": 2, "attention_heads": HEADS, "ffn_dim": 64, "vocab_size": 99}, HEADS,
     ["bmm", "view", "add", "max", "view"]),
]  # fmt: skip


def tiny_model(model_type: str, attention: str = "eager", **sizes: Any) -> nn.Module:
    config = AutoConfig.for_model(model_type, **sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@torch.no_grad()
def match_model(model: nn.Module, dynamic: bool | None = None, **kwargs: Any) -> tuple[list[Any], dict[Any, Any]]:
    ids = torch.randint(3, 99, (2, LENGTH))
    return match_graphs(model, ids, use_cache=False, dynamic=dynamic, **kwargs)


@pytest.mark.parametrize(("model_type", "sizes", "kv_heads", "steps"), EAGER)
def test_attention_of_models_is_a_site(model_type: str, sizes: dict[str, Any], kv_heads: int, steps: list[str]) -> None:
    matches, values = match_model(tiny_model(model_type, **sizes))
    assert len(matches) == 2
    for match in matches:
        site = check_site(match, values)
        assert isinstance(site.scores, Logits)
        assert [operation(step) for step in site.scores.steps] == steps
        for node, num_heads in [(site.query, HEADS), (site.key, kv_heads), (site.value, kv_heads)]:
            assert example_of(node).shape == (2, num_heads, LENGTH, 16)


@pytest.mark.parametrize(("model_type", "sizes"), [("llama", GQA), ("bloom", SIZES)])
def test_lengths_may_be_symbols(model_type: str, sizes: dict[str, Any]) -> None:
    matches, values = match_model(tiny_model(model_type, **sizes), dynamic=True)
    for match in matches:
        assert isinstance(example_of(check_site(match, values).query).shape[2], torch.SymInt)


def test_padded_llama_s_key_heads_are_not_repeated() -> None:
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0, :5] = 0
    matches, values = match_model(tiny_model("llama", "sdpa", **GQA), attention_mask=mask)
    for match in matches:
        site = check_site(match, values)
        assert isinstance(site.scores, Masked)
        assert example_of(site.key).shape[1] == 2


def test_a_chunk_on_a_static_cache_reads_the_cache_itself() -> None:
    model = tiny_model("llama", "sdpa", **GQA)
    cache = StaticCache(config=model.config, max_cache_len=2 * LENGTH)
    chunks = torch.randint(3, 99, (2, 2, LENGTH))
    with torch.no_grad():
        model(chunks[0], past_key_values=cache)
        matches, _ = match_graphs(lambda ids: model(ids, past_key_values=cache).logits, chunks[1])
    for match in matches:
        assert isinstance(match, AttentionSite)
        assert isinstance(match.scores, Masked)
        assert match.key.op == "placeholder"
        assert example_of(match.key).shape == (2, 2, 2 * LENGTH, 16)


def test_output_attentions_keeps_attention_dense() -> None:
    matches, _ = match_model(tiny_model("llama", **GQA), output_attentions=True)
    assert {match.reason for match in matches} == {SkipReason.WEIGHTS_USED}


def test_sinks_are_reported() -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    matches, _ = match_model(tiny_model("gpt_oss", **GQA | experts))
    assert all(isinstance(match, Skipped) for match in matches)
    assert [match.reason for match in matches] == [SkipReason.UNRECOGNISED] * 2


def test_routers_of_experts_are_no_attention() -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    matches, _ = match_model(tiny_model("mixtral", **GQA | experts))
    assert [type(match) for match in matches] == [AttentionSite] * 2
