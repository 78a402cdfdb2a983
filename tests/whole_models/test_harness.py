"""lm-evaluation-harness runs its tasks with a model that prefills sparse, offline."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from helpers.tiny_model import save_tiny_model

pytest.importorskip("lm_eval", reason='needs the extra "eval"')

from flexprefill_compile.backend import flexprefill

WORDS = ("river", "candle", "basket", "ladder", "button")


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """A task of multiple choice over prompts of several hundred bytes, from a file."""
    chance = random.Random(0)
    rows = [
        {"text": " ".join(chance.choice(WORDS) for _ in range(80)), "choices": WORDS[:3], "label": index % 3}
        for index in range(3)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    settings = {
        "task": "last_word",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "last_word.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return tmp_path


def test_a_local_task_gives_the_same_with_gamma_1_as_dense(
    task_folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    import harness  # noqa: PLC0415

    model, tokenizer = harness.load_model(save_tiny_model(tmp_path_factory.mktemp("model")), "cpu")
    tokenizer.eos_token = "!"  # the harness wants one
    scores = []
    for options in (None, {"gamma": 1.0, "min_length": 1, "block_size": 64}):
        results = harness.run_tasks(
            harness.create_harness_model(model, tokenizer, options), ["last_word"], task_folder, None
        )
        likelihoods = [value[0] for sample in results["samples"]["last_word"] for value in sample["filtered_resps"]]
        scores.append(likelihoods)
        assert "acc,none" in results["results"]["last_word"]
    assert len(scores[0]) == 9
    assert scores[1] == pytest.approx(scores[0], abs=1e-3)
    assert flexprefill.report.num_rewritten >= 2
    assert all(site.rewritten for site in flexprefill.report.sites)


def test_options_are_read_as_numbers_and_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    import harness  # noqa: PLC0415

    read = harness.read_options(["gamma=0.9", "min_budget=512", "estimator=flexprefill", "max_budget=None"])
    assert read == {"gamma": 0.9, "min_budget": 512, "estimator": "flexprefill", "max_budget": None}
    with pytest.raises(harness.UsageError, match=r"^an option must be name=value, got 'gamma'$"):
        harness.read_options(["gamma"])
