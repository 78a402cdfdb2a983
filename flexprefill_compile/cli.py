"""The command ``flexprefill``: arguments in, a table out, one clear sentence for each mistake."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flexprefill_compile.config import InvalidOptionError, SparsePrefillConfig
from flexprefill_compile.errors import UsageError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, or 2 after a mistake in what was asked."""
    options = _create_parser().parse_args(arguments)
    try:
        options.run(options)
    except (UsageError, InvalidOptionError) as error:
        print(f"flexprefill: error: {error}", file=sys.stderr)
        return 2
    return 0


def _create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flexprefill", description="Sparse prefill for PyTorch models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="prefill a real model dense and sparse, and compare",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.set_defaults(run=_run_demo)
    demo.add_argument("--model", type=Path, help="a Hugging Face model folder or a GGUF file (SmolLM2-135M-Instruct)")
    demo.add_argument("--text", type=Path, help="a text file (licence texts of this machine)")
    demo.add_argument("--tokens", type=_positive, default=8192, metavar="N", help="tokens of the text, at most")
    demo.add_argument("--gamma", type=float, default=SparsePrefillConfig.gamma, help="share of attention to reach")
    demo.add_argument("--device", default="cpu", help="cpu or cuda")
    demo.add_argument("--rounds", type=_positive, default=3, metavar="N", help="timed prefills of each kind, in turn")
    return parser


def _run_demo(options: argparse.Namespace) -> None:
    try:
        from flexprefill_compile.demo import run_demo  # noqa: PLC0415  (needs the extra "hf")
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the demo needs {error.name}, of the extra 'hf': pip install 'flexprefill-compile[hf]'"
        ) from None
    run_demo(
        model_path=options.model,
        text_path=options.text,
        max_tokens=options.tokens,
        config=SparsePrefillConfig(gamma=options.gamma, min_length=min(options.tokens, SparsePrefillConfig.min_length)),
        device=options.device,
        rounds=options.rounds,
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
