"""The command ``flexprefill``: arguments in, a table out, one clear sentence for each mistake."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..settings.config import KERNEL_BACKENDS, InvalidOptionError, SparsePrefillConfig
from ..tasks.table import TASKS

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
    _add_demo(commands)
    _add_audit(commands)
    _add_calibrate(commands)
    _add_evaluate(commands)
    tune = _add_command(commands, "tune", _run_tune, "measure from what length on sparse prefill pays on this machine")
    _add_shape(tune)
    _add_bench(commands)
    _add_model_bench(commands)
    return parser


def _add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    command.set_defaults(run=run)
    return command


def _add_bench(commands: Any) -> None:
    bench = _add_command(
        commands, "bench", _run_bench, "time the attention of one layer, by stage, beside dense attention"
    )
    _add_shape(bench)
    bench.add_argument("--inputs", nargs="*", default=["structured", "random"], choices=INPUT_KINDS)
    bench.add_argument("--model", type=Path, help="where real inputs come from, as for demo (SmolLM2-135M-Instruct)")
    bench.add_argument("--saved", type=Path, metavar="FILE", help="also a (query, key, value) of torch.save")
    bench.add_argument("--lengths", type=_positive, nargs="+", default=[8192, 32768, 131072], metavar="N")
    bench.add_argument("--gamma", type=float, default=SparsePrefillConfig.gamma, help="share of attention to reach")
    bench.add_argument("--min-budget", type=int, default=SparsePrefillConfig.min_budget, metavar="N")
    bench.add_argument("--max-budget", type=_positive, metavar="N", help="tokens of a row to compute at most")
    bench.add_argument("--estimator", default="flexprefill", metavar="NAME", help="how blocks are chosen")
    bench.add_argument("--max-density", type=float, help="also time the call as it runs under this ceiling")
    bench.add_argument("--kernel-backend", default=SparsePrefillConfig.kernel_backend, choices=KERNEL_BACKENDS)
    bench.add_argument("--calls", type=_positive, default=15, metavar="N", help="timed calls of each kind, at most")
    bench.add_argument("--peer", action="append", default=[], help="module:function to time beside ours, f(q, k, v)")
    bench.add_argument("--json", type=Path, help="a file for all figures")
    bench.add_argument("--plot", type=Path, help="a file for a picture (extra 'plot')")


def _add_model_bench(commands: Any) -> None:
    bench = _add_command(
        commands,
        "bench-model",
        _run_model_bench,
        "time a Llama-shaped model with random weights to its first token, dense and sparse",
    )
    _add_shape(bench, head_dim=False)
    bench.add_argument("--layers", type=_positive, default=32, metavar="N")
    bench.add_argument("--hidden", type=_positive, default=4096, metavar="N")
    bench.add_argument("--intermediate", type=_positive, default=14336, metavar="N")
    bench.add_argument("--vocabulary", type=_positive, default=128256, metavar="N")
    bench.add_argument("--lengths", type=_positive, nargs="+", default=[8192, 32768, 131072], metavar="N")
    bench.add_argument("--density", type=float, default=0.25, help="share of the causal blocks to compute")
    bench.add_argument("--json", type=Path, help="a file for the figures")


def _add_demo(commands: Any) -> None:
    demo = _add_command(commands, "demo", _run_demo, "prefill a real model dense and sparse, and compare")
    _add_prompt(demo)
    _add_selection(demo)
    demo.add_argument("--rounds", type=_positive, default=3, metavar="N", help="timed prefills of each kind, in turn")


def _add_audit(commands: Any) -> None:
    audit = _add_command(
        commands,
        "audit",
        _run_audit,
        "measure what sparse prefill of a model loses: by layer and head, and in its predictions",
    )
    _add_prompt(audit)
    _add_selection(audit)
    audit.add_argument("--rows", type=_positive, default=128, metavar="N", help="query rows a head to compute exactly")
    audit.add_argument("--json", type=Path, metavar="FILE", help="a file for all figures")
    audit.add_argument("--plots", type=Path, metavar="FOLDER", help="a folder for pictures")


def _add_calibrate(commands: Any) -> None:
    calibrate = _add_command(
        commands,
        "calibrate",
        _run_calibrate,
        "find the cheapest settings by layer that keep a model's loss within a bound",
    )
    calibrate.add_argument("--output", type=Path, required=True, metavar="FILE", help="where the policy goes, as JSON")
    calibrate.add_argument("--model", type=Path, help="a Hugging Face model folder or a GGUF file (SmolLM2)")
    calibrate.add_argument(
        "--text", type=Path, nargs="+", default=[], metavar="FILE", help="text files (licence texts of this machine)"
    )
    calibrate.add_argument("--tokens", type=_positive, default=8192, metavar="N", help="tokens of each text, at most")
    calibrate.add_argument("--bound", type=float, default=0.01, help="by how much of itself perplexity may grow")
    calibrate.add_argument("--estimator", default="auto", help="how blocks are chosen")
    calibrate.add_argument("--block-size", type=_positive, default=SparsePrefillConfig.block_size, metavar="N")
    calibrate.add_argument("--layers-at-once", type=_positive, default=1, metavar="N", help="layers set alike")
    calibrate.add_argument("--max-runs", type=_positive, default=100, metavar="N", help="measurements, at most")
    calibrate.add_argument("--device", default="cpu", help="cpu or cuda")


def _add_evaluate(commands: Any) -> None:
    evaluate = _add_command(
        commands,
        "evaluate",
        _run_evaluate,
        "long-context tasks on a real model, prefilled dense and sparse, side by side",
    )
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


def _add_shape(command: argparse.ArgumentParser, *, head_dim: bool = True) -> None:
    command.add_argument("--device", default="cuda", help="cuda or cpu")
    command.add_argument("--heads", type=_positive, nargs=2, default=[32, 8], metavar=("QUERY", "KEY"))
    if head_dim:
        command.add_argument("--head-dim", type=_positive, default=128, metavar="N")


def _run_tune(options: argparse.Namespace) -> None:
    from .tune import run_tune  # noqa: PLC0415  (imports inductor)

    run_tune(options.device, options.heads, options.head_dim)


def _run_bench(options: argparse.Namespace) -> None:
    from .bench import BenchPlan, run_bench  # noqa: PLC0415  (imports inductor)

    config = SparsePrefillConfig(
        gamma=options.gamma,
        min_budget=options.min_budget,
        max_budget=options.max_budget,
        max_density=options.max_density,
        estimator=options.estimator,
        kernel_backend=options.kernel_backend,
    )
    plan = BenchPlan(
        device=options.device,
        inputs=options.inputs,
        saved=options.saved,
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
    from ..bench.model import ModelShape  # noqa: PLC0415  (imports inductor)
    from .bench_model import run_model_bench  # noqa: PLC0415

    shape = ModelShape(
        layers=options.layers,
        hidden=options.hidden,
        intermediate=options.intermediate,
        heads=options.heads[0],
        kv_heads=options.heads[1],
        vocabulary=options.vocabulary,
    )
    run_model_bench(shape, options.lengths, options.density, options.device, options.json)


def _run_evaluate(options: argparse.Namespace) -> None:
    with _extra_hf("evaluate"):
        from .evaluate import run_evaluate  # noqa: PLC0415  (needs the extra "hf")
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
        from .demo import run_demo  # noqa: PLC0415  (needs the extra "hf")
    run_demo(
        model_path=options.model,
        text_path=options.text,
        max_tokens=options.tokens,
        config=SparsePrefillConfig(**_read_selection(options), min_length=min(options.tokens, 4096)),
        device=options.device,
        rounds=options.rounds,
    )


def _run_audit(options: argparse.Namespace) -> None:
    with _extra_hf("audit"):
        from .audit import run_audit  # noqa: PLC0415  (needs the extra "hf")
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


def _run_calibrate(options: argparse.Namespace) -> None:
    try:
        from .calibrate import run_calibrate  # noqa: PLC0415  (needs the extra "hf")
    except ModuleNotFoundError as error:
        raise UsageError(
            f"calibrate needs {error.name}, of the extra 'hf': pip install 'flexprefill-compile[hf]'"
        ) from None
    run_calibrate(
        output=options.output,
        model_path=options.model,
        text_paths=options.text,
        max_tokens=options.tokens,
        bound=options.bound,
        config=SparsePrefillConfig(estimator=options.estimator, block_size=options.block_size),
        layers_at_once=options.layers_at_once,
        max_runs=options.max_runs,
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
