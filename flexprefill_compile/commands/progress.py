"""What a long command shows while it works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


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
