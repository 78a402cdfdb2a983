"""The command ``flexprefill``: arguments in, a table out, one clear sentence for each mistake."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Protocol

from ..errors import UsageError
from ..settings.config import InvalidOptionError
from . import audit, bench, bench_model, bench_real, calibrate, demo, evaluate, tune


class Command(Protocol):
    """A file of this folder. What needs an extra of the package, it imports in its run.

    Attributes:
        HELP: What the command does, as ``flexprefill --help`` prints it.
    """

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments."""

    def run(self, arguments: argparse.Namespace) -> None:
        """Run the command with what was parsed.

        Raises:
            UsageError: Something the user can set right; likewise ``InvalidOptionError``.
        """


COMMANDS: dict[str, Command] = {
    "demo": demo,
    "audit": audit,
    "calibrate": calibrate,
    "evaluate": evaluate,
    "tune": tune,
    "bench": bench,
    "bench-model": bench_model,
    "bench-real": bench_real,
}


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
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=command.HELP, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser
