"""Run tasks of lm-evaluation-harness with a model that prefills sparse.

Run: python examples/harness.py --model FOLDER_OR_GGUF --tasks TASK ... --options gamma=0.9 min_length=1024
Needs the extra "eval": pip install 'flexprefill-compile[hf,eval]'. `--dense` runs the same without sparse prefill.

Every forward of the harness is a prefill, so the rows that it scores are sparse ones too; what it generates is decoded
densely on the cache of a sparse prefill.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from flexprefill_compile.errors import UsageError
from flexprefill_compile.models import load_model


def create_harness_model(model: Any, tokenizer: Any, options: Mapping[str, Any] | None, batch_size: int = 1) -> HFLM:
    """Wrap a model for the harness; with options it prefills sparse, without it stays as it is.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        options: As for ``torch.compile`` with the backend "flexprefill"; None is dense.
        batch_size: Prompts at a time.
    """
    if options is not None:
        model.compile(backend="flexprefill", dynamic=True, options=dict(options))
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def run_tasks(
    harness_model: HFLM, tasks: Sequence[str], include_path: Path | None, limit: int | None
) -> dict[str, Any]:
    """Run tasks of the harness, or of YAML files in a folder, and return its results."""
    manager = TaskManager(include_path=str(include_path) if include_path else None)
    results: dict[str, Any] = simple_evaluate(
        harness_model, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=1000
    )
    return results


def read_options(items: Sequence[str]) -> dict[str, Any]:
    """Read ``name=value`` items; values are Python's numbers and names, or else text.

    Raises:
        UsageError: An item has no "=".
    """
    options: dict[str, Any] = {}
    for item in items:
        name, separator, value = item.partition("=")
        if not separator:
            raise UsageError(f"an option must be name=value, got {item!r}")
        try:
            options[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            options[name] = value
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description="Tasks of lm-evaluation-harness, prefilled sparse.")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder or a GGUF file (SmolLM2-135M-Instruct)")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="names that the harness knows")
    parser.add_argument("--include-path", type=Path, metavar="FOLDER", help="YAML files of more tasks")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--options", nargs="*", default=[], metavar="NAME=VALUE", help="of SparsePrefillConfig")
    parser.add_argument("--dense", action="store_true", help="don't prefill sparse")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N")
    parser.add_argument("--limit", type=int, metavar="N", help="samples of each task, at most")
    given = parser.parse_args(arguments)
    try:
        options = None if given.dense else read_options(given.options)
        model, tokenizer = load_model(given.model, given.device)
    except UsageError as error:
        print(f"harness.py: error: {error}", file=sys.stderr)
        return 2
    harness_model = create_harness_model(model, tokenizer, options, given.batch_size)
    print(make_table(run_tasks(harness_model, given.tasks, given.include_path, given.limit)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
