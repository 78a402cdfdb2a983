"""``flexprefill bench-real`` on a tiny model: its figures, its files, and one sentence for each mistake."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import one_sentence
from helpers.tiny_model import save_tiny_model

from flexprefill_compile.bench.real.compare import Row
from flexprefill_compile.commands.bench_real import find_fastest_dense
from flexprefill_compile.commands.cli import main
from flexprefill_compile.errors import UsageError

TEXT = "Everyone is permitted to copy and distribute verbatim copies of this license document.\n" * 20
PEERS = """
from helpers.models import causal_attention as attend

def fail(query, key, value):
    raise RuntimeError("no such head dim\\nmore words")
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    (folder / "text.txt").write_text(TEXT)
    return folder


def run(model_folder: Path, *more: str) -> int:
    where = ["--device", "cpu", "--model", str(model_folder), "--texts", str(model_folder / "text.txt")]
    return main(["bench-real", *where, "--rounds", "1", *more])


@pytest.fixture(scope="module")
def measured(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str, Path]:
    """Run it once: its JSON, its output and its plot."""
    folder = tmp_path_factory.mktemp("bench_real")
    (folder / "real_peers.py").write_text(PEERS)
    patch, lines = pytest.MonkeyPatch(), []
    patch.syspath_prepend(str(folder))
    patch.setattr("builtins.print", lambda *parts, **_: lines.append(" ".join(parts)))
    sparse = ["--sparse", "gamma=1.0", "--sparse", "estimator='streaming',min_budget=128"]
    peers = ["--peer", "real_peers:attend", "--peer", "real_peers:fail"]
    files = ["--json", str(folder / "figures.json"), "--plot", str(folder / "figures.png")]
    try:
        assert run(model_folder, "--lengths", "600", *sparse, *peers, *files) == 0
    finally:
        patch.undo()
    return json.loads((folder / "figures.json").read_text()), "\n".join(lines), folder / "figures.png"


def test_dense_sparse_and_peers_stand_in_one_table(measured: tuple[list[dict[str, Any]], str, Path]) -> None:
    rows, output, plot = measured
    by_method = {row["method"]: row for row in rows}
    assert [row["tokens"] for row in rows] == [600] * len(rows)
    streaming = by_method["estimator='streaming',min_budget=128"]
    for name in ("dense flash", "gamma=1.0", "real_peers:attend"):
        assert by_method[name]["divergence"] < streaming["divergence"] / 100
        assert by_method[name]["density"] == 1
        assert by_method[name]["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
    assert 0 < streaming["density"] < 1
    assert min(streaming["attention_ms"], streaming["prefill_ms"] - streaming["attention_ms"]) > 0
    assert re.search(r"^text.txt +600 +gamma=1.0 +100.0% +0.0000 +1.0000 +100.0% ", output, re.MULTILINE)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert f"wrote {plot}" in output


def test_a_peer_that_fails_gets_a_note(measured: tuple[list[dict[str, Any]], str, Path]) -> None:
    rows, output, _ = measured
    (failed,) = [row for row in rows if row["method"] == "real_peers:fail"]
    assert failed["note"] == "RuntimeError: no such head dim"
    assert "divergence" not in failed
    assert "text.txt 600 real_peers:fail: RuntimeError: no such head dim" in output


def test_times_are_over_the_fastest_dense_backend(measured: tuple[list[dict[str, Any]], str, Path]) -> None:
    rows, output, _ = measured
    dense = [row for row in rows if row["method"].startswith("dense") and not row["note"]]
    fastest = min(dense, key=lambda row: row["attention_ms"])["method"]
    assert f"faster: over {fastest}" in output
    assert re.search(rf"^text.txt +600 +{fastest} .* 1.00x", output, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparse", "gamma"], "--sparse must be NAME=VALUE,... or default, got 'gamma'"),
        (["--sparse", "gamma=2"], "gamma must be in (0, 1], got 2"),
        (["--sparse", "gama=0.9"], "gama"),
        (["--peer", "no_such_module:f"], "peer must be module:function"),
        (["--lengths", "60000"], "fewer than 60000: give longer --texts"),
        (["--json", "no_such_folder/figures.json"], "no_such_folder"),
    ],
)
def test_mistakes_get_one_sentence(
    arguments: list[str], message: str, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model_folder, *arguments) == 2
    assert message in one_sentence(capsys)


def test_no_dense_backend_is_an_error() -> None:
    failed = Row("text", 600, "dense flash", None, None, "RuntimeError: no such head dim")
    with pytest.raises(
        UsageError, match="no dense backend runs this model's attention: RuntimeError: no such head dim"
    ):
        find_fastest_dense([failed])
