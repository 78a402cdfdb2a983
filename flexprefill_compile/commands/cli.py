"""The command ``flexprefill`` and its table of commands; a mistake of the user's prints one sentence."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Protocol

from .. import __version__
from ..errors import UsageError
from ..settings.config import InvalidOptionError
from . import audit, bench, bench_model, bench_real, calibrate, demo, evaluate, explain, tune


class Command(Protocol):
    """A file of this folder. It imports what needs an extra of the package in ``run``.

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
    "explain": explain,
    "audit": audit,
    "calibrate": calibrate,
    "evaluate": evaluate,
    "tune": tune,
    "bench": bench,
    "bench-model": bench_model,
    "bench-real": bench_real,
}

# What torchrun may start.
_ON_RANKS = ("bench-model",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, or 2 after a mistake in what was asked."""
    options = _create_parser().parse_args(arguments)
    try:
        _check_ranks(options.command)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers and torch, to their own callers
            options.run(options)
    except (UsageError, InvalidOptionError) as error:
        print(f"flexprefill: error: {error}", file=sys.stderr)
        return 2
    return 0


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to each option that has one; several values as they are typed."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if isinstance(action.default, list) and action.default:
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return action.help if action.default in (None, []) else super()._get_help_string(action)


def _create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flexprefill", description="Sparse prefill for PyTorch models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}", help="print the version")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.HELP, formatter_class=_HelpFormatter)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run, command=name)
    return parser


def _check_ranks(command: str) -> None:
    """Refuse a command under torchrun that would do the same on every rank.

    Raises:
        UsageError: There is more than one rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and command not in _ON_RANKS:
        raise UsageError(f"{command} runs in one process: start it without torchrun, which is for {_ON_RANKS[0]}")
