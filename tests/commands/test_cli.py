"""The command ``flexprefill``: its table of commands, its extras, and one sentence for each mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command_line import one_sentence

from flexprefill_compile.commands.cli import COMMANDS, main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere"], "no model at /nowhere"),
        (["--gamma", "1.5"], "gamma must be in (0, 1], got 1.5"),
        (["--device", "cuda"], "device cuda is not available"),
        (["--device", "abacus"], "device must be cpu or cuda, got 'abacus'"),
    ],
)
def test_a_mistake_gives_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["demo", *arguments]) == 2
    assert one_sentence(capsys) == message


def test_a_folder_without_a_model_gives_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", str(tmp_path)]) == 2
    assert one_sentence(capsys).startswith(f"transformers finds no causal language model in {tmp_path}: ")


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


@pytest.mark.parametrize(("command", "name"), [("demo", "the demo"), ("audit", "audit"), ("evaluate", "evaluate")])
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
