"""Evaluation of the tasks: scores against brute force, dense against sparse."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers.tiny_model import create_byte_tokenizer, create_tiny_llama
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import BertConfig, BertLMHeadModel, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from flexprefill_compile import SparsePrefillConfig
from flexprefill_compile.errors import UsageError
from flexprefill_compile.tasks.comparison import Comparison
from flexprefill_compile.tasks.encoder import Encoder
from flexprefill_compile.tasks.evaluation import check_lengths, check_model, evaluate
from flexprefill_compile.tasks.sample import Sample
from flexprefill_compile.tasks.scoring import Score, score_sample
from flexprefill_compile.tasks.summary import summarise
from flexprefill_compile.tasks.table import TASKS, create_samples

LENGTHS = (700, 900)
EXACT = SparsePrefillConfig(gamma=1.0, min_budget=0, min_length=1, block_size=32)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return create_tiny_llama()


@pytest.fixture(scope="module")
def exact(model: LlamaForCausalLM) -> tuple[list[Comparison], int]:
    """Every task at two lengths with gamma = 1, and how many graphs that compiled."""
    encoder = Encoder(create_byte_tokenizer())
    samples = {(task, length): create_samples(task, encoder, length, 2, 0) for length in LENGTHS for task in TASKS}
    counters.clear()
    comparisons = evaluate(model, samples, {"flexprefill": EXACT})
    return comparisons, counters["stats"]["unique_graphs"]


def test_gamma_1_scores_as_dense_does(exact: tuple[list[Comparison], int]) -> None:
    comparisons, _ = exact
    assert [(c.task, c.length) for c in comparisons] == [(task, length) for length in LENGTHS for task in TASKS]
    for comparison in comparisons:
        for dense, sparse in zip(comparison.dense, comparison.sparse, strict=True):
            assert sparse.log_likelihood == pytest.approx(dense.log_likelihood, abs=1e-4)
            assert sparse.accuracy == dense.accuracy
        assert comparison.density == pytest.approx(1)
        assert comparison.verdict == "no difference seen"


def test_all_samples_of_all_tasks_and_lengths_share_one_graph(exact: tuple[list[Comparison], int]) -> None:
    assert exact[1] == 1


def score_by_brute_force(model: LlamaForCausalLM, prompt: Tensor, answer: Tensor) -> float:
    """One forward over prompt and answer together, without a cache."""
    with torch.no_grad():
        logits = model(torch.cat([prompt, answer])[None], use_cache=False).logits[0].double()
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return torch.stack([row[token] for row, token in zip(rows, answer, strict=True)]).mean().item()


@pytest.mark.parametrize("answer_tokens", [1, 5])
def test_the_score_of_an_answer_is_that_of_brute_force(model: LlamaForCausalLM, answer_tokens: int) -> None:
    tokens = torch.randint(0, 256, (60 + answer_tokens,))
    sample = Sample(tuple(tokens[:60].tolist()), tuple(tokens[60:].tolist()))
    score = score_sample(model, model, sample, 20)
    assert score.log_likelihood == pytest.approx(score_by_brute_force(model, tokens[:60], tokens[60:]), abs=1e-5)


def test_the_score_of_a_text_is_that_of_its_last_tokens(model: LlamaForCausalLM) -> None:
    tokens = torch.randint(0, 256, (90,))
    score = score_sample(model, model, Sample(tuple(tokens.tolist())), 30)
    assert score.log_likelihood == pytest.approx(score_by_brute_force(model, tokens[:60], tokens[60:]), abs=1e-5)
    with torch.no_grad():
        predictions = model(tokens[None]).logits[0, 59:-1].argmax(-1)
    assert score.accuracy == pytest.approx((predictions == tokens[60:]).double().mean().item())


def test_an_answer_is_right_if_greedy_decoding_gives_it(model: LlamaForCausalLM) -> None:
    prompt = torch.randint(0, 256, (1, 60))
    greedy = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, 60:].tolist()
    assert score_sample(model, model, Sample(tuple(prompt[0].tolist()), tuple(greedy)), 20).accuracy == 1
    wrong = (*greedy[:-1], (greedy[-1] + 1) % 256)
    assert score_sample(model, model, Sample(tuple(prompt[0].tolist()), wrong), 20).accuracy == 0


def test_the_answer_is_decoded_on_the_cache_of_the_prefill(model: LlamaForCausalLM) -> None:
    tokens = torch.randint(0, 256, (65,))
    sample = Sample(tuple(tokens[:60].tolist()), tuple(tokens[60:].tolist()))

    def prefill_other_prompt(prompt: Tensor, **kwargs: Any) -> Any:
        return model(prompt.flip(1), **kwargs)

    expected = score_by_brute_force(model, tokens[:60].flip(0), tokens[60:])
    assert score_sample(prefill_other_prompt, model, sample, 20).log_likelihood == pytest.approx(expected, abs=1e-5)


def compare(dense: list[float], sparse: list[float], accuracies: tuple[float, float] = (1, 1)) -> Comparison:
    sides = [
        [Score(value, accuracy) for value in side] for side, accuracy in zip((dense, sparse), accuracies, strict=True)
    ]
    return Comparison("needle", 2048, "flexprefill", [None] * len(dense), sides[0], sides[1], [0.5] * len(dense))


@pytest.mark.parametrize(
    ("comparison", "verdict"),
    [
        (compare([-1.0, -1.1, -0.9, -1.0], [-2.0, -2.2, -1.9, -2.1]), "worse"),
        (compare([-2.0, -2.2, -1.9, -2.1], [-1.0, -1.1, -0.9, -1.0]), "better"),
        (compare([-1.0, -1.1, -0.9, -1.0], [-2.0, -0.2, -1.9, -0.1]), "no difference seen"),
        (compare([-1.0] * 4, [-1.00001] * 4), "no difference seen"),
        (compare([-1.0], [-9.0]), "no difference seen"),
        (compare([-1.0] * 8, [-1.0] * 8, accuracies=(1, 0)), "worse"),
    ],
)
def test_verdicts(comparison: Comparison, verdict: str) -> None:
    assert comparison.verdict == verdict


def test_the_summary_says_where_sparse_loses() -> None:
    lost, even = compare([-1.0, -1.1, -0.9], [-2.0, -2.2, -1.9]), compare([-1.0, -1.1], [-1.0, -1.1])
    lines = summarise([lost, even]).splitlines()
    row = r"needle +2048 +flexprefill +-1\.000 +-2\.033 +-1\.033 +-1\.\d+ to -0\.\d+ +100% +100% +50% +worse"
    assert re.fullmatch(row, lines[2])
    assert lines[-1] == "flexprefill: worse than dense on 1 of 2: needle at 2048; 50% of blocks computed"


def test_models_that_are_no_causal_language_models_give_one_sentence() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    both_ways = BertLMHeadModel(BertConfig(vocab_size=64, **sizes)).eval()
    with pytest.raises(UsageError, match=r"^model must be a causal language model with a cache, got BertLM"):
        score_sample(both_ways, both_ways, Sample((1, 2, 3, 4), (5, 6)), 2)
    translator = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_ff=32, num_layers=1, num_heads=2))
    with pytest.raises(UsageError, match=r"^model must be a causal language model of transformers, got T5"):
        check_model(translator, [512])


def test_a_length_of_two_blocks_and_the_answer_is_enough() -> None:
    check_lengths([192], [EXACT])
    with pytest.raises(UsageError, match=r"^length must be at least 192 tokens, two blocks of 32 and 128 for"):
        check_lengths([191], [EXACT])
