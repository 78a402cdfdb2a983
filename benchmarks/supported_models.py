"""Run every family of the model zoo, compiled against uncompiled, and write docs/models.md.

Run: python benchmarks/supported_models.py
     python benchmarks/supported_models.py --inductor --families llama bloom    (prints the rows, writes nothing)
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers.checked_attention import without_code_generation  # noqa: E402
from helpers.zoo.checks import check_family  # noqa: E402
from helpers.zoo.models import FAMILIES, LEFT_OUT, THOROUGH, build_model  # noqa: E402
from helpers.zoo.table import HOW, Row, describe_failure, describe_family, format_page  # noqa: E402

PAGE = ROOT / "docs" / "models.md"


def run_family(name: str, inductor: bool, is_thorough: bool) -> Row:
    """Build and check one family; an error becomes its row."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    family = FAMILIES[name]
    try:
        with contextlib.nullcontext() if inductor else without_code_generation():
            return describe_family(family, check_family(build_model(family), is_thorough=is_thorough))
    except Exception as error:
        return describe_failure(family, error)


def main() -> None:
    """Write the page, or print the rows of the families named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), metavar="NAME", help="print only these")
    parser.add_argument("--inductor", action="store_true", help="compile with inductor: a minute or more a family")
    parser.add_argument("--thorough", action="store_true", help="check all of every family, not of some")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="families at a time")
    arguments = parser.parse_args()

    names = arguments.families or list(FAMILIES)
    rows: dict[str, Row] = {}
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as workers:
        thorough = set(names if arguments.thorough else THOROUGH)
        pending = {workers.submit(run_family, name, arguments.inductor, name in thorough): name for name in names}
        for number, future in enumerate(as_completed(pending), start=1):
            name = pending[future]
            rows[name] = future.result()
            print(f"{number}/{len(names)}", *rows[name], sep=" | ", file=sys.stderr)

    page = format_page(
        [rows[name] for name in names],
        LEFT_OUT,
        thorough="all families" if arguments.thorough else "; ".join(THOROUGH),
        how=HOW[arguments.inductor],
        command="python benchmarks/supported_models.py"
        + " --inductor" * arguments.inductor
        + " --thorough" * arguments.thorough,
    )
    if arguments.families:
        print(page)
    else:
        PAGE.write_text(page)
        print(f"{PAGE.relative_to(ROOT)}: {len(rows)} families", file=sys.stderr)


if __name__ == "__main__":
    main()
