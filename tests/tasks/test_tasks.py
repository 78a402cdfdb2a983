"""The task suite: samples keep their lengths, hold their answers where they say, and follow their seeds."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.tiny_model import create_byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from flexprefill_compile.errors import UsageError
from flexprefill_compile.tasks.encoder import Encoder
from flexprefill_compile.tasks.kinds.filler import WORDS
from flexprefill_compile.tasks.kinds.word_count import draw_words
from flexprefill_compile.tasks.sample import ANSWER_ROOM, Sample
from flexprefill_compile.tasks.table import TASKS, TEXTS, check_tasks, create_samples

TOKENIZER = create_byte_tokenizer()
ENCODER = Encoder(TOKENIZER)
LENGTH = 1500
LONGEST_SENTENCE = 120


def text_of(tokens: tuple[int, ...]) -> str:
    return str(TOKENIZER.decode(tokens))


@given(name=st.sampled_from(list(TASKS)), length=st.integers(900, 3000), seed=st.integers(0, 10**9))
@settings(max_examples=30, deadline=None)
def test_prompts_have_their_length_and_seeds_reproduce(name: str, length: int, seed: int) -> None:
    samples = create_samples(name, ENCODER, length, 2, seed)
    assert [len(sample.prompt) for sample in samples] == [length - ANSWER_ROOM] * 2
    assert all(len(sample.answer) <= ANSWER_ROOM for sample in samples)
    assert all(bool(sample.answer) == (name not in TEXTS) for sample in samples)
    assert samples == create_samples(name, ENCODER, length, 2, seed)
    assert samples[0].prompt != samples[1].prompt


@pytest.mark.parametrize("name", TASKS)
def test_another_seed_gives_other_samples(name: str) -> None:
    prompts = {create_samples(name, ENCODER, LENGTH, 1, seed)[0].prompt for seed in range(4)}
    assert len(prompts) == 4


@pytest.mark.parametrize("name", ["needle", "multi_key", "variables", "copy"])
def test_the_answer_stands_once_in_the_prompt_at_its_depth(name: str) -> None:
    for sample in create_samples(name, ENCODER, 4000, 5, 0):
        prompt, answer = text_of(sample.prompt), text_of(sample.answer)
        assert prompt.count(answer.strip()) == 1
        start, end = prompt.index("\n\n") + 2, prompt.rindex("\n\n")
        place = prompt.index(answer.strip())
        assert sample.depth is not None
        told = 8 * 45 if name == "multi_key" else 200  # other facts before it, and its own words
        assert abs(place - start - sample.depth * (end - start)) < LONGEST_SENTENCE + told


def test_depths_are_spread_evenly() -> None:
    assert [sample.depth for sample in create_samples("needle", ENCODER, LENGTH, 5, 0)] == [0, 0.25, 0.5, 0.75, 1]
    first, *_, last = create_samples("needle", ENCODER, LENGTH, 5, 0)
    assert text_of(first.prompt).split("\n\n")[1].startswith(" The secret number of")
    assert text_of(last.prompt).split("\n\n")[1].endswith(f"is{text_of(last.answer)}.")


@pytest.mark.parametrize("name", ["needle", "multi_key"])
def test_the_question_asks_for_what_is_told(name: str) -> None:
    for sample in create_samples(name, ENCODER, LENGTH, 3, 0):
        text, _, question = text_of(sample.prompt).rpartition("\n\n")
        key = question.partition("secret number of the ")[2].partition("?")[0]
        assert f"The secret number of the {key} is{text_of(sample.answer)}." in text
        assert text.count("The secret number of the") == (1 if name == "needle" else 8)
        assert text.count(f"of the {key} is") == 1


def test_the_value_of_a_variable_follows_from_the_text() -> None:
    for sample in create_samples("variables", ENCODER, LENGTH, 5, 0):
        text = text_of(sample.prompt)
        values: dict[str, str] = {}
        for line in text.splitlines():
            if line.startswith("Variable "):
                name, value = line.removeprefix("Variable ").split(" = ")
                values[name] = value if value.isdecimal() else values[value]  # set before it is used
        assert len(values) == 6
        assert values[text.split()[-5]] == text_of(sample.answer).strip()


def test_the_copy_goes_on_word_for_word() -> None:
    (sample,) = create_samples("copy", ENCODER, LENGTH, 1, 0)
    text = text_of(sample.prompt)
    _, first, second = text.split("\nThe list of the ")
    assert first.splitlines()[0] == second + text_of(sample.answer)


def test_the_most_frequent_word_is_the_answer() -> None:
    (sample,) = create_samples("word_count", ENCODER, 2500, 1, 0)
    words = text_of(sample.prompt).split("\n\n")[1].split()
    counts = {word: words.count(word) for word in words}
    winner, runner_up = sorted(counts, key=lambda word: -counts[word])[:2]
    assert winner == text_of(sample.answer).strip()
    assert counts[winner] == pytest.approx(len(words) / 4, abs=1)
    assert counts[winner] > 2 * counts[runner_up]


def test_drawn_words_are_as_many_as_the_groups_hold() -> None:
    import random  # noqa: PLC0415

    words = draw_words(random.Random(0), 8, most_frequent="x", others=["a", "b"])
    assert [words[:4].count(" x"), words[4:].count(" x"), len(words)] == [1, 1, 8]


def test_no_word_is_listed_twice() -> None:
    assert len(set(WORDS)) == len(WORDS)


def test_samples_of_text_start_at_different_places() -> None:
    for name in TEXTS:
        starts = {text_of(sample.prompt)[:200] for sample in create_samples(name, ENCODER, LENGTH, 8, 0)}
        assert len(starts) == 8, name


def test_prompts_start_as_the_tokenizer_starts_texts() -> None:
    tokenizer = create_byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = template
    for name in TASKS:
        (sample,) = create_samples(name, Encoder(tokenizer), LENGTH, 1, 0)
        assert sample.prompt[0] == tokenizer.bos_token_id
        assert sample.prompt.count(tokenizer.bos_token_id) == 1
        assert len(sample.prompt) == LENGTH - ANSWER_ROOM


class MergingTokenizer:
    """Reads three letters at a time, so that a question and its answer may share a token."""

    def __call__(self, text: str, **_: Any) -> Any:
        return type("Tokens", (), {"input_ids": [text[i : i + 3] for i in range(0, len(text), 3)]})


def test_the_seam_moves_back_where_the_tokenizer_merges_across_it() -> None:
    encoder = Encoder(MergingTokenizer())
    assert encoder.split_answer("abcd", " xy") == (["abc"], ["d x", "y"])
    assert encoder.split_answer("abcdef", " xy") == (["abc", "def"], [" xy"])


def test_an_unknown_task_gives_one_sentence() -> None:
    with pytest.raises(UsageError, match=r"^task must be one of needle, multi_key, .*, code, got 'chess'$"):
        check_tasks(["needle", "chess"])


@pytest.mark.parametrize("name", ["needle", "multi_key", "variables", "copy", "word_count"])
def test_a_length_that_a_task_can_not_do_with_says_what_it_needs(name: str) -> None:
    with pytest.raises(
        UsageError, match=rf"^length must be at least \d+ tokens for the task {name}, got 200$"
    ) as error:
        create_samples(name, ENCODER, 200, 1, 0)
    needed = int(str(error.value).split()[5])
    (sample,) = create_samples(name, ENCODER, needed + 64, 1, 0)
    assert isinstance(sample, Sample)
