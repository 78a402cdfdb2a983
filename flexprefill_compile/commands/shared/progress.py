"""What a long command shows while it works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


@contextmanager
def show_steps(console: Console) -> Iterator[Callable[[str], None]]:
    """Show the step under way and its time; where the console is no terminal, print each step that begins."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None)

        def step(description: str) -> None:
            progress.reset(task, description=description)
            if not console.is_terminal:
                console.print(f"{description} ...", highlight=False)

        yield step


@contextmanager
def show_progress(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """Show how many of ``total`` steps are done; where the console is no terminal, print each kind of step once."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    seen: set[str] = set()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=total)

        def step(description: str) -> None:
            progress.update(task, description=description)
            if description != "loading the model":
                progress.advance(task)
            if not console.is_terminal and description not in seen:
                console.print(f"{description} ...", highlight=False)
            seen.add(description)

        yield step
