"""What the docs show is what the code does."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import flexprefill_compile
from flexprefill_compile import LayerPolicy, Policy, SparsePrefillConfig, block_masks, models, parallel
from flexprefill_compile.block_masks import record_densities
from flexprefill_compile.settings.registry import BUILT_IN, find_defaults

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
    defaults = find_defaults(SparsePrefillConfig.estimator)
    for name, field in SparsePrefillConfig.__dataclass_fields__.items():
        shown = {
            "max_budget": "none",
            "min_length": "measured",
            "max_density": "measured",
            "kernel_options": "none",
            "dense_layers": "none",
            "policy": "none",
            "sequence_parallel": "none",
            "tensor_parallel": "none",
            "gamma": f"{defaults.gamma}; {defaults.cpu_gamma} on a CPU",
            "block_size": f"128; {defaults.gpu_block_size} on a GPU",
            "min_budget": "768 to 1024",
            "estimator": '`"pooled"`',
            "on_skip": '`"keep"`',
            "kernel_backend": '`"auto"`',
        }.get(name, str(field.default))
        assert f"| `{name}` | {shown} |" in readme


def test_every_file_that_the_docs_name_exists() -> None:
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        text = re.sub(
            r"^ *```python\n.*?```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL
        )  # may be new files
        words = re.sub(r"[()`]", " ", text).split()
        paths = [word.strip(",.;:") for word in words if word.strip(",.;:").endswith((".py", ".md"))]
        missing = [path for path in paths if not ((ROOT / path).exists() or (document.parent / path).exists())]
        assert not missing, f"{document.name} names {missing}"


def test_every_name_that_the_docs_import_exists() -> None:
    shown = "".join(file.read_text() for file in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
    imports = re.findall(r"from (flexprefill_compile[\w.]*) import ([\w, ]+)", shown)
    assert len(imports) > 5
    for module, names in imports:
        for name in names.split(","):
            assert hasattr(importlib.import_module(module), name.split()[0]), f"{module} has no {name}"


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


def test_flex_attention_as_the_docs_call_it_runs(recwarn: pytest.WarningsRecorder) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "masks-and-shapes.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, "docs/masks-and-shapes.md", "exec"), names)
    assert names["output"].shape == (1, 8, 4096, 64)
    assert not [warning for warning in recwarn if "not compiled" in str(warning.message)]


def test_the_model_that_the_docs_deploy_runs_sparse(model_folder: Path) -> None:
    example, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL)
    model, _ = models.load_model(model_folder, "cpu")
    with record_densities() as densities:
        shorter = example.replace("16384", "4224")
        exec(
            compile(shorter, "docs/deploy.md", "exec"),
            {"model": model, "input_ids": torch.ones(1, 4, dtype=torch.long)},
        )
    assert len(densities) == 2


def test_the_policy_file_that_the_docs_show_is_one(tmp_path: Path) -> None:
    (shown,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "estimators.md").read_text(), re.DOTALL)
    (tmp_path / "policy.json").write_text(shown)
    policy = Policy.load(tmp_path / "policy.json")
    assert dict(policy.layers) == {0: LayerPolicy(dense=True), 7: LayerPolicy(gamma=0.99, estimator="auto")}


def test_the_docs_name_every_estimator() -> None:
    document = (ROOT / "docs" / "estimators.md").read_text()
    for name in BUILT_IN:
        assert f"| `{name}`" in document


def test_the_readme_lists_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        path = page.relative_to(ROOT)
        assert f"| [{path}]({path}) |" in readme


def test_the_site_shows_every_page() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        assert f": {page.name}\n" in navigation


def test_the_api_page_shows_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    names = {f"flexprefill_compile.{name}" for name in flexprefill_compile.__all__} - {
        "flexprefill_compile.block_masks"
    }
    names |= {f"flexprefill_compile.block_masks.{name}" for name in block_masks.__all__}
    names |= {f"flexprefill_compile.parallel.{name}" for name in parallel.__all__}
    assert sorted(re.findall(r"^::: (\S+)$", page, re.MULTILINE)) == sorted(names)


def test_the_quickstart_runs(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a tiny model in place of SmolLM2, and a prompt short enough for a test."""
    example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    shorter = example
    for shown, run in {
        'backend="flexprefill"': 'backend="flexprefill", options={"min_length": 1, "min_budget": 0, "gamma": 0.5}',
        "max_tokens=8192": "max_tokens=512",
        "max_new_tokens=12": "max_new_tokens=1",
    }.items():
        assert shown in shorter
        shorter = shorter.replace(shown, run)
    load_model = models.load_model
    monkeypatch.setattr(models, "load_model", lambda path, device: load_model(model_folder, device))
    exec(compile(shorter, "README.md", "exec"), {})
    assert "2 attention calls ran sparse" in capsys.readouterr().out


def test_how_it_works_names_every_module_once() -> None:
    document = (ROOT / "docs" / "how-it-works.md").read_text()
    named = re.findall(r"^\| `([\w/]+\.py)` \|", document, re.MULTILINE)
    folders = ("flexprefill_compile", "passes", "block_masks")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py") if file.name != "__init__.py"]
    assert sorted(named) == sorted(str(file.relative_to(ROOT)) for file in files)


def test_how_it_works_names_every_folder() -> None:
    document = (ROOT / "docs" / "how-it-works.md").read_text()
    folders = ("flexprefill_compile", "passes", "block_masks")
    for room in {file.parent.relative_to(ROOT) for folder in folders for file in (ROOT / folder).rglob("*.py")}:
        assert f"{room}/" in document
