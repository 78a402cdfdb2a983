"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_SELECTION: tuple[tuple[str, type, str], ...] = (
    ("--gamma", float, "share of attention to reach"),
    ("--min-budget", int, "tokens a row computes at least"),
    ("--max-budget", int, "tokens a row computes at most"),
    ("--block-size", int, "tokens to a side of a block"),
)


def positive(text: str) -> int:
    """Read a whole number above 0: a ``type`` for ``add_argument``.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """Add the model, the text, how much of it to take, and the device."""
    parser.add_argument("--model", type=Path, help="a Hugging Face model folder or a GGUF file (SmolLM2-135M-Instruct)")
    parser.add_argument("--text", type=Path, help="a text file (licence texts of this machine)")
    parser.add_argument("--tokens", type=positive, default=8192, metavar="N", help="tokens of the text, at most")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")


def add_selection(parser: argparse.ArgumentParser, *, has_estimator: bool = True) -> None:
    """Add fields of ``SparsePrefillConfig``; ``read_selection`` returns those that the user gave."""
    for name, kind, text in _SELECTION:
        parser.add_argument(name, type=kind, default=argparse.SUPPRESS, metavar="N", help=text)
    if has_estimator:
        parser.add_argument("--estimator", default=argparse.SUPPRESS, metavar="NAME", help="how blocks are chosen")
    parser.add_argument("--policy", default=argparse.SUPPRESS, metavar="FILE", help="settings by layer, as JSON")


def read_selection(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of ``add_selection`` that the user gave."""
    names = ("gamma", "min_budget", "max_budget", "block_size", "estimator", "policy")
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def add_layer_shape(parser: argparse.ArgumentParser, *, head_dim: bool = True) -> None:
    """Add the device and the heads of an attention layer."""
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--heads", type=positive, nargs=2, default=[32, 8], metavar=("QUERY", "KEY"))
    if head_dim:
        parser.add_argument("--head-dim", type=positive, default=128, metavar="N")
