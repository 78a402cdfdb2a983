"""What the docs show is what the code does."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flexprefill_compile import LayerPolicy, Policy, SparsePrefillConfig
from flexprefill_compile.block_masks import record_densities
from flexprefill_compile.settings.registry import BUILT_IN

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
        shown = {
            "max_budget": "none",
            "min_length": "measured",
            "max_density": "measured",
            "kernel_options": "none",
            "dense_layers": "none",
            "policy": "none",
            "estimator": '`"flexprefill"`',
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


def test_the_estimator_that_the_docs_show_runs() -> None:
    document = (ROOT / "docs" / "estimators.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    assert example.index("register_estimator(") > 0
    names: dict[str, Any] = {}
    with record_densities() as densities:
        exec(compile(example, "docs/estimators.md", "exec"), names)
    assert names["output"].shape == (1, 4, 4096, 64)
    assert torch.isfinite(names["output"]).all()
    assert (densities[0] < 1).all()


def test_the_policy_file_that_the_docs_show_is_one(tmp_path: Path) -> None:
    (shown,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "estimators.md").read_text(), re.DOTALL)
    (tmp_path / "policy.json").write_text(shown)
    policy = Policy.load(tmp_path / "policy.json")
    assert dict(policy.layers) == {0: LayerPolicy(dense=True), 7: LayerPolicy(gamma=0.99, estimator="auto")}


def test_the_docs_name_every_estimator() -> None:
    document = (ROOT / "docs" / "estimators.md").read_text()
    for name in BUILT_IN:
        assert f"| `{name}`" in document
