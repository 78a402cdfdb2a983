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
    demo.add_argument(
        "--min-budget", type=int, default=SparsePrefillConfig.min_budget, metavar="N", help="tokens a row, at least"
    )
    demo.add_argument("--estimator", default=SparsePrefillConfig.estimator, help="how blocks are chosen")
    demo.add_argument("--device", default="cpu", help="cpu or cuda")
    demo.add_argument("--rounds", type=_positive, default=3, metavar="N", help="timed prefills of each kind, in turn")
    tune = commands.add_parser(
        "tune",
        help="measure from what length on sparse prefill pays on this machine",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    tune.set_defaults(run=_run_tune)
    _add_shape(tune)
    bench = commands.add_parser(
        "bench",
        help="time the attention of one layer on a GPU, by stage, beside dense attention",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    bench.set_defaults(run=_run_bench)
    _add_shape(bench)
    bench.add_argument("--lengths", type=_positive, nargs="+", default=[8192, 32768, 131072], metavar="N")
    bench.add_argument("--gamma", type=float, default=SparsePrefillConfig.gamma, help="share of attention to reach")
    bench.add_argument("--calls", type=_positive, default=15, metavar="N", help="timed calls of each kind")
    bench.add_argument("--json", type=Path, help="a file for all figures")
    return parser


def _add_shape(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="cuda", help="cuda, or cpu for tune")
    command.add_argument("--heads", type=_positive, nargs=2, default=[32, 8], metavar=("QUERY", "KEY"))
    command.add_argument("--head-dim", type=_positive, default=128, metavar="N")


def _run_tune(options: argparse.Namespace) -> None:
    from flexprefill_compile.tune import run_tune  # noqa: PLC0415  (imports inductor)

    run_tune(options.device, options.heads, options.head_dim)


def _run_bench(options: argparse.Namespace) -> None:
    from flexprefill_compile.bench import run_bench  # noqa: PLC0415  (imports inductor)

    run_bench(options.lengths, options.heads, options.head_dim, options.gamma, options.calls, options.json)


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
        config=SparsePrefillConfig(
            gamma=options.gamma,
            min_budget=options.min_budget,
            estimator=options.estimator,
            min_length=min(options.tokens, 4096),
        ),
        device=options.device,
        rounds=options.rounds,
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
