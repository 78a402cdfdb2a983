"""What the docs show is what the code does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from flexprefill_compile import SparsePrefillConfig

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="the docs show torch 2.13's graphs")
def test_the_docs_show_the_graphs_that_the_example_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import show_rewrite  # noqa: PLC0415

    shown = (ROOT / "docs" / "how-it-works.md").read_text()
    for graph in show_rewrite.graphs_before_and_after():
        assert graph in shown
    sys.modules.pop("show_rewrite")


def test_the_readme_lists_every_setting_with_its_default() -> None:
    readme = (ROOT / "README.md").read_text()
    for name, field in SparsePrefillConfig.__dataclass_fields__.items():
        if name == "estimator":
            continue
        shown = {
            "max_budget": "none",
            "min_length": "measured",
            "max_density": "measured",
            "kernel_options": "none",
            "on_skip": '`"keep"`',
            "kernel_backend": '`"auto"`',
        }.get(name, str(field.default))
        assert f"| `{name}` | {shown} |" in readme


def test_every_file_that_the_docs_name_exists() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        words = document.read_text().replace("(", " ").replace(")", " ").replace("`", " ").split()
        paths = [word.strip(",.;:") for word in words if word.strip(",.;:").endswith((".py", ".md"))]
        missing = [path for path in paths if not ((ROOT / path).exists() or (document.parent / path).exists())]
        assert not missing, f"{document.name} names {missing}"
