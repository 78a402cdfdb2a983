"""The command ``flexprefill``: arguments in, a table out, one clear sentence for each mistake."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexprefill_compile.config import KERNEL_BACKENDS, InvalidOptionError, SparsePrefillConfig
from flexprefill_compile.errors import UsageError

INPUT_KINDS = ("structured", "random", "rotary", "real")


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
    tune = commands.add_parser(
        "tune",
        help="measure from what length on sparse prefill pays on this machine",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    tune.set_defaults(run=_run_tune)
    _add_shape(tune)
    _add_bench(commands)
    _add_model_bench(commands)
    return parser


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="time the attention of one layer, by stage, beside dense attention",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    bench.set_defaults(run=_run_bench)
    _add_shape(bench)
    bench.add_argument("--inputs", nargs="+", default=["structured", "random"], choices=INPUT_KINDS)
    bench.add_argument("--model", type=Path, help="where real inputs come from, as for demo (SmolLM2-135M-Instruct)")
    bench.add_argument("--lengths", type=_positive, nargs="+", default=[8192, 32768, 131072], metavar="N")
    bench.add_argument("--gamma", type=float, default=SparsePrefillConfig.gamma, help="share of attention to reach")
    bench.add_argument("--min-budget", type=int, default=SparsePrefillConfig.min_budget, metavar="N")
    bench.add_argument("--max-budget", type=_positive, metavar="N", help="tokens of a row to compute at most")
    bench.add_argument("--max-density", type=float, help="also time the call as it runs under this ceiling")
    bench.add_argument("--kernel-backend", default=SparsePrefillConfig.kernel_backend, choices=KERNEL_BACKENDS)
    bench.add_argument("--calls", type=_positive, default=15, metavar="N", help="timed calls of each kind, at most")
    bench.add_argument("--peer", action="append", default=[], help="module:function to time beside ours, f(q, k, v)")
    bench.add_argument("--json", type=Path, help="a file for all figures")
    bench.add_argument("--plot", type=Path, help="a file for a picture (extra 'plot')")


def _add_model_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench-model",
        help="time a Llama-shaped model with random weights to its first token, dense and sparse",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    bench.set_defaults(run=_run_model_bench)
    _add_shape(bench, head_dim=False)
    bench.add_argument("--layers", type=_positive, default=32, metavar="N")
    bench.add_argument("--hidden", type=_positive, default=4096, metavar="N")
    bench.add_argument("--intermediate", type=_positive, default=14336, metavar="N")
    bench.add_argument("--vocabulary", type=_positive, default=128256, metavar="N")
    bench.add_argument("--lengths", type=_positive, nargs="+", default=[8192, 32768, 131072], metavar="N")
    bench.add_argument("--density", type=float, default=0.25, help="share of the causal blocks to compute")
    bench.add_argument("--json", type=Path, help="a file for the figures")


def _add_shape(command: argparse.ArgumentParser, *, head_dim: bool = True) -> None:
    command.add_argument("--device", default="cuda", help="cuda or cpu")
    command.add_argument("--heads", type=_positive, nargs=2, default=[32, 8], metavar=("QUERY", "KEY"))
    if head_dim:
        command.add_argument("--head-dim", type=_positive, default=128, metavar="N")


def _run_tune(options: argparse.Namespace) -> None:
    from flexprefill_compile.tune import run_tune  # noqa: PLC0415  (imports inductor)

    run_tune(options.device, options.heads, options.head_dim)


def _run_bench(options: argparse.Namespace) -> None:
    from flexprefill_compile.bench.run import BenchPlan, run_bench  # noqa: PLC0415  (imports inductor)

    config = SparsePrefillConfig(
        gamma=options.gamma,
        min_budget=options.min_budget,
        max_budget=options.max_budget,
        max_density=options.max_density,
        kernel_backend=options.kernel_backend,
    )
    plan = BenchPlan(
        device=options.device,
        inputs=options.inputs,
        lengths=options.lengths,
        heads=options.heads,
        head_dim=options.head_dim,
        config=config,
        calls=options.calls,
        model=options.model,
        peers=options.peer,
        json_path=options.json,
        plot_path=options.plot,
    )
    run_bench(plan)


def _run_model_bench(options: argparse.Namespace) -> None:
    from flexprefill_compile.bench.model import ModelShape  # noqa: PLC0415  (imports inductor)
    from flexprefill_compile.bench.prefill import run_model_bench  # noqa: PLC0415

    shape = ModelShape(
        layers=options.layers,
        hidden=options.hidden,
        intermediate=options.intermediate,
        heads=options.heads[0],
        kv_heads=options.heads[1],
        vocabulary=options.vocabulary,
    )
    run_model_bench(shape, options.lengths, options.density, options.device, options.json)


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
        config=SparsePrefillConfig(gamma=options.gamma, min_length=min(options.tokens, 4096)),
        device=options.device,
        rounds=options.rounds,
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
