"""A pool of processes that are the ranks of one gloo group: started once, they run the functions that tests send."""

from __future__ import annotations

import datetime
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

SIZE = 4
COLLECTIVE_TIMEOUT_S = 40


class RankPool:
    """``SIZE`` ranks; each job runs on the first few of them and must end in time."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, job: Callable[..., Any], *args: Any, size: int = 2, timeout_s: float = 150) -> list[Any]:
        """Call ``job(group, *args)`` on ``size`` ranks; return what each returned, or the exception that it raised.

        Args:
            job: A function of a module that the ranks can import: one of ``helpers``.
            *args: Its other arguments.
            size: How many ranks run it; their group is the first argument.
            timeout_s: What takes longer fails, and the pool starts anew for the next test.
        """
        if not self._processes:
            self._start()
        pipes = self._pipes[:size]
        for pipe in pipes:
            pipe.send((job, size, args))
        results = []
        for pipe in pipes:
            if not pipe.poll(timeout_s):
                self.stop()
                raise TimeoutError(f"a rank didn't end {job.__name__} in {timeout_s} s")
            results.append(pipe.recv())
        return results

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        store = str(Path(tempfile.mkdtemp()) / "store")
        for rank in range(SIZE):
            own, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, store, theirs), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(own)


def _serve(rank: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE, timeout=timeout)
    groups = {size: dist.new_group(list(range(size)), timeout=timeout) for size in range(1, SIZE + 1)}
    while True:
        job, size, args = pipe.recv()
        torch.compiler.reset()
        torch.manual_seed(0)
        try:
            with torch.no_grad():
                result = job(groups[size], *args)
        except Exception as error:
            result = error if _is_plain(error) else RuntimeError(traceback.format_exc())
        pipe.send(result)


def _is_plain(error: Exception) -> bool:
    """Tell whether a test can read the error's text as a user does."""
    return type(error).__module__.startswith("flexprefill_compile")
