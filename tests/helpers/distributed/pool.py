"""A pool of processes that become the ranks of a gloo group for each function that a test sends them."""

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
COLLECTIVE_TIMEOUT_S = 100


class RankPool:
    """``SIZE`` processes, started once; each job runs on the first few of them and must end in time."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp())
        self._num_jobs = 0
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, job: Callable[..., Any], *args: Any, size: int = 2, timeout_s: float = 150) -> list[Any]:
        """Call ``job(*args)`` on a world of ``size`` ranks; return what each returned, or the exception that it raised.

        Args:
            job: A function of a module that the ranks can import: one of ``helpers``.
            *args: Its arguments.
            size: How many ranks run it.
            timeout_s: What takes longer fails, and the pool starts anew for the next test.
        """
        if not self._processes:
            self._start()
        pipes = self._pipes[:size]
        self._num_jobs += 1
        store = str(self._folder / f"store_{self._num_jobs}")
        for pipe in pipes:
            pipe.send((job, size, store, args))
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
        for rank in range(SIZE):
            own, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(own)


def _serve(rank: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        job, size, store, args = pipe.recv()
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        pipe.send(_run(job, rank, size, store, args))


def _run(job: Callable[..., Any], rank: int, size: int, store: str, args: tuple[Any, ...]) -> Any:
    timeout = datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    torch.compiler.reset()
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            return job(*args)
    except Exception as error:
        return error if _is_plain(error) else RuntimeError(traceback.format_exc())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _is_plain(error: Exception) -> bool:
    """Tell whether a test can read the error's text as a user does."""
    return type(error).__module__.startswith("flexprefill_compile")
