"""The site's pages that stand outside docs/: the readme is its start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")


def on_files(files: Files, config: Any) -> Files:
    """Add them; on the site they lie beside the pages of docs/."""
    for name in PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text().replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let a page of docs/ link to them."""
    for name in PAGES:
        markdown = markdown.replace(f"](../{name}", f"]({name}")
    return markdown
