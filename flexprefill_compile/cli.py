"""The command ``flexprefill``: arguments in, a table out, one clear sentence for each mistake."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexprefill_compile.config import InvalidOptionError, SparsePrefillConfig
from flexprefill_compile.errors import UsageError
from flexprefill_compile.tasks.registry import TASKS


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
    _add_demo(commands)
    _add_audit(commands)
    _add_evaluate(commands)
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


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="prefill a real model dense and sparse, and compare",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.set_defaults(run=_run_demo)
    _add_prompt(demo)
    demo.add_argument("--gamma", type=float, default=SparsePrefillConfig.gamma, help="share of attention to reach")
    demo.add_argument("--rounds", type=_positive, default=3, metavar="N", help="timed prefills of each kind, in turn")


def _add_audit(commands: Any) -> None:
    audit = commands.add_parser(
        "audit",
        help="measure what sparse prefill of a model loses: by layer and head, and in its predictions",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    audit.set_defaults(run=_run_audit)
    _add_prompt(audit)
    _add_selection(audit)
    audit.add_argument("--rows", type=_positive, default=128, metavar="N", help="query rows a head to compute exactly")
    audit.add_argument("--json", type=Path, metavar="FILE", help="a file for all figures")
    audit.add_argument("--plots", type=Path, metavar="FOLDER", help="a folder for pictures")


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="long-context tasks on a real model, prefilled dense and sparse, side by side",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    evaluate.set_defaults(run=_run_evaluate)
    evaluate.add_argument("--model", type=Path, help="a Hugging Face folder or a GGUF file (SmolLM2-135M-Instruct)")
    evaluate.add_argument("--device", default="cpu", help="cpu or cuda")
    evaluate.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help=f"of {', '.join(TASKS)}")
    evaluate.add_argument(
        "--lengths", type=_positive, nargs="+", default=[2048, 4096, 8192], metavar="N", help="tokens, with the answer"
    )
    evaluate.add_argument("--samples", type=_positive, default=16, metavar="N", help="of each task at each length")
    evaluate.add_argument("--estimators", nargs="+", default=[SparsePrefillConfig.estimator], metavar="NAME")
    _add_selection(evaluate, has_estimator=False)
    evaluate.add_argument("--min-length", type=_positive, default=1, metavar="N", help="shorter prompts stay dense")
    evaluate.add_argument("--seed", type=int, default=0, metavar="N", help="other samples for other seeds")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="a file for all figures")


def _add_prompt(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model", type=Path, help="a Hugging Face model folder or a GGUF file (SmolLM2-135M-Instruct)"
    )
    command.add_argument("--text", type=Path, help="a text file (licence texts of this machine)")
    command.add_argument("--tokens", type=_positive, default=8192, metavar="N", help="tokens of the text, at most")
    command.add_argument("--device", default="cpu", help="cpu or cuda")


def _add_selection(command: argparse.ArgumentParser, *, has_estimator: bool = True) -> None:
    """Add fields of SparsePrefillConfig; those that are not given keep their defaults."""
    numbers: tuple[tuple[str, type, str], ...] = (
        ("--gamma", float, "share of attention to reach"),
        ("--min-budget", int, "tokens a row computes at least"),
        ("--max-budget", int, "tokens a row computes at most"),
        ("--block-size", int, "tokens to a side of a block"),
    )
    for name, kind, text in numbers:
        command.add_argument(name, type=kind, default=argparse.SUPPRESS, metavar="N", help=text)
    if has_estimator:
        command.add_argument("--estimator", default=argparse.SUPPRESS, metavar="NAME", help="how blocks are chosen")
    command.add_argument("--policy", default=argparse.SUPPRESS, metavar="FILE", help="settings by layer, as JSON")


def _read_selection(options: argparse.Namespace) -> dict[str, Any]:
    """Return what was given of ``_add_selection``."""
    names = ("gamma", "min_budget", "max_budget", "block_size", "estimator", "policy")
    return {name: getattr(options, name) for name in names if hasattr(options, name)}


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


def _run_evaluate(options: argparse.Namespace) -> None:
    with _extra_hf("evaluate"):
        from flexprefill_compile.tasks.evaluate import run_evaluate  # noqa: PLC0415  (needs the extra "hf")
    fields = _read_selection(options) | {"min_length": options.min_length}
    run_evaluate(
        model_path=options.model,
        device=options.device,
        tasks=options.tasks,
        lengths=options.lengths,
        count=options.samples,
        seed=options.seed,
        configs={name: SparsePrefillConfig(**(fields | {"estimator": name})) for name in options.estimators},
        json_path=options.json,
    )


def _run_demo(options: argparse.Namespace) -> None:
    with _extra_hf("the demo"):
        from flexprefill_compile.demo import run_demo  # noqa: PLC0415  (needs the extra "hf")
    run_demo(
        model_path=options.model,
        text_path=options.text,
        max_tokens=options.tokens,
        config=SparsePrefillConfig(gamma=options.gamma, min_length=min(options.tokens, 4096)),
        device=options.device,
        rounds=options.rounds,
    )


def _run_audit(options: argparse.Namespace) -> None:
    with _extra_hf("audit"):
        from flexprefill_compile.quality.audit_command import run_audit  # noqa: PLC0415  (needs the extra "hf")
    run_audit(
        model_path=options.model,
        text_path=options.text,
        max_tokens=options.tokens,
        options=_read_selection(options),
        rows=options.rows,
        json_path=options.json,
        plots_path=options.plots,
        device=options.device,
    )


@contextmanager
def _extra_hf(command: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{command} needs {error.name}, of the extra 'hf': pip install 'flexprefill-compile[hf]'"
        ) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
