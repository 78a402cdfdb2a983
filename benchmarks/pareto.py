"""Density against perplexity, on real text: each estimator, and the oracle that knows the true attention mass.

Run: python benchmarks/pareto.py --json pareto.json --plot docs/pareto.png
     python benchmarks/pareto.py --device cuda --texts licences python code --lengths 2048 4096 8192 --json pareto.json

The model runs uncompiled with one compiled attention that takes any selection, so that a setting costs one prefill.
Points that the JSON file holds are not measured again; what is printed and drawn are all its points of this model.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from oracle_blocks import select_by_oracle
from pareto_curves import Point, compare_methods, format_curves, group_curves, plot_curves
from torch import Tensor

from flexprefill_compile.errors import UsageError
from flexprefill_compile.models import DEFAULT_TEXTS, load_model, read_tokens
from flexprefill_compile.quality.calibration.text_measurer import TextMeasurer, select_tables
from flexprefill_compile.settings.config import SparsePrefillConfig

ESTIMATORS = ("pooled", "auto", "flexprefill", "xattention", "sampled", "streaming", "oracle")
STREAMING_BUDGETS = (256, 512, 1024, 2048)  # its window is all that it has
# Below it, ratios differ by what float32 leaves open.
TOLERANCE = 2e-4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> int:
    """Measure what is missing; print the table and whether auto is anywhere worse; draw the plot."""
    options = _create_parser().parse_args()
    try:
        model, tokenizer = load_model(options.model, options.device, DTYPES[options.dtype])
        name = options.model.name if options.model else "SmolLM2-135M-Instruct"
        points = load_points(options.json, name)
        with torch.no_grad():
            for text in options.texts:
                tokens, source = read_text(tokenizer, text, max(options.lengths))
                for length in options.lengths:
                    if tokens.shape[1] < length:
                        raise UsageError(f"{source} must be of {length} tokens, got {tokens.shape[1]}")
                    for point in measure_points(model, tokens[:, :length].to(options.device), source, options, points):
                        points.append(point)
                        save_points(options.json, name, points)
    except (UsageError, ValueError) as error:
        print(f"pareto: error: {error}", file=sys.stderr)
        return 2
    curves = group_curves(points)
    print(format_curves(curves), compare_methods(curves, "auto", "flexprefill", TOLERANCE)[1], sep="\n\n")
    if options.plot:
        plot_curves(curves, points, options.plot)
    return 0


def _create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face model folder or a GGUF file (SmolLM2)")
    parser.add_argument("--texts", nargs="+", default=["licences"], metavar="TEXT", help="licences, python, code, FILE")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048], metavar="N", help="tokens of each text")
    parser.add_argument("--estimators", nargs="+", default=ESTIMATORS, metavar="NAME")
    parser.add_argument("--gammas", type=float, nargs="+", default=[0.7, 0.8, 0.9, 0.95, 0.98], metavar="SHARE")
    parser.add_argument("--min-budgets", type=int, nargs="+", default=[256, 512, 1024], metavar="N", help="tokens")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[128], metavar="N", help="tokens")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="the points")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture of the curves")
    return parser


def read_text(tokenizer: Any, text: str, max_tokens: int) -> tuple[Tensor, str]:
    """Tokenise a text by its name: licences as Debian ships them, Python's language reference or its code, or a file.

    Raises:
        UsageError: There is no such text.
    """
    if text == "licences":
        files = list(DEFAULT_TEXTS)
    elif text == "code":
        files = [Path(argparse.__file__)]
    elif text == "python":
        from pydoc_data import topics  # noqa: PLC0415  (a long text that comes with Python)

        content = "\n".join(topics.topics[name] for name in sorted(topics.topics))
        return _tokenise(tokenizer, content, max_tokens), text
    else:
        return read_tokens(tokenizer, Path(text), max_tokens)
    if missing := [str(file) for file in files if not file.exists()]:
        raise UsageError(f"no text {text!r} on this machine: {missing[0]} is missing")
    return _tokenise(tokenizer, "\n".join(file.read_text(encoding="utf-8") for file in files), max_tokens), text


def _tokenise(tokenizer: Any, content: str, max_tokens: int) -> Tensor:
    tokens: Tensor = tokenizer(content, return_tensors="pt", truncation=True, max_length=max_tokens).input_ids
    return tokens


def measure_points(
    model: Any, tokens: Tensor, source: str, options: argparse.Namespace, known: list[Point]
) -> Iterator[Point]:
    """Measure each setting of a text that is not known yet."""
    measurers = {select: TextMeasurer(model, [tokens], select) for select in (select_tables, select_by_oracle)}
    measurers[select_by_oracle].dense = measurers[select_tables].dense
    have = {_identify(point) for point in known}
    for estimator, block_size, (gamma, budget) in list_settings(options):
        point = Point(
            text=source,
            tokens=tokens.shape[1],
            estimator=estimator,
            gamma=gamma,
            min_budget=budget,
            block_size=block_size,
            density=math.nan,
            ratio=math.nan,
        )
        if _identify(point) in have:
            continue
        is_oracle = estimator == "oracle"
        config = SparsePrefillConfig(
            gamma=gamma, min_budget=budget, block_size=block_size, estimator="flexprefill" if is_oracle else estimator
        )
        measurer = measurers[select_by_oracle if is_oracle else select_tables]
        increase, densities = measurer.measure(dict.fromkeys(measurer.dense.plain_layers, config))
        density = sum(densities.values()) / len(densities)
        point = dataclasses.replace(point, density=density, ratio=math.exp(increase))
        print(point, file=sys.stderr)
        yield point


def list_settings(options: argparse.Namespace) -> list[tuple[str, int, tuple[float, int]]]:
    """Return estimator, block size, gamma and min_budget of each point; the default gamma where it plays no part."""
    settings = {
        "streaming": [
            (SparsePrefillConfig.gamma, budget) for budget in sorted({*options.min_budgets, *STREAMING_BUDGETS})
        ],
    }
    others = list(itertools.product(options.gammas, options.min_budgets))
    return [
        (estimator, block_size, setting)
        for estimator, block_size in itertools.product(options.estimators, options.block_sizes)
        for setting in settings.get(estimator, others)
    ]


def _identify(point: Point) -> tuple[Any, ...]:
    return dataclasses.astuple(dataclasses.replace(point, density=0, ratio=0))


def load_points(path: Path, model: str) -> list[Point]:
    """Read the points of a file, none if there is none.

    Raises:
        UsageError: It holds points of another model, or none.
    """
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        points = [Point(**point) for point in content["points"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} holds no points: {error}") from None
    if content["model"] != model:
        raise UsageError(f"{path} holds points of another model, {content['model']}: choose another --json")
    return points


def save_points(path: Path, model: str, points: list[Point]) -> None:
    """Write all points; a stop in between leaves the file as it was."""
    content = {"model": model, "torch": torch.__version__, "points": [dataclasses.asdict(point) for point in points]}
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(content, indent=0), encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
