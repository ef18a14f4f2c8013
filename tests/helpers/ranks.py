"""Process groups on gloo, in which tests run.

A test that is marked by :func:`on_ranks` is a function of the number of ranks, ``world``. Every rank of a group runs it, and it
passes if it passes on all of them. Starting processes is slow, so one group runs all tests of its size, one after the other.
After a failure the ranks may no longer agree on which collective comes next, so the next test gets a new group.
"""

import importlib
import multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import timedelta
from io import StringIO
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

SECONDS = 120  # that a test may take on a busy machine
TIMEOUT = 60  # of collectives, in seconds
GRACE = 5  # seconds that the other ranks have to end after one has failed

#: Imported once, by the process that the ranks are forked from.
PRELOAD = [
    "tests.helpers.sharded",
    "functorch.compile",
    "torch._dynamo.backends.common",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.optim",
]


def on_ranks(*sizes: int) -> Callable:
    """A test that runs in process groups of each of these sizes. Its other arguments are passed to the ranks by pickle."""

    def mark(test: Callable) -> Callable:
        return pytest.mark.usefixtures("ranks")(pytest.mark.parametrize("world", sizes, scope="session")(test))

    return mark


def context() -> multiprocessing.context.ForkServerContext:
    """Starts processes that have imported PyTorch and this library, and that see no GPU: a mesh would take GPUs, of which there
    may be fewer than ranks."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(PRELOAD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        forkserver.ensure_running()
    return made


class Ranks:
    """A process group of ``world`` processes, which is started when it is first needed."""

    def __init__(self, world: int):
        self.world, self.processes, self.pipes = world, [], []

    def start(self) -> None:
        meeting, made = Path(tempfile.mkdtemp(), "meeting"), context()
        for rank in range(self.world):
            ours, theirs = made.Pipe()
            process = made.Process(target=_serve, args=(rank, self.world, str(meeting), theirs), daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
            self.processes.append(process)
            self.pipes.append(ours)

    def run(self, test: Callable, arguments: dict[str, Any]) -> None:
        """Run a test on every rank, and fail if it fails on any."""
        if not self.processes or not all(process.is_alive() for process in self.processes):
            self.close()
            self.start()
        for pipe in self.pipes:
            pipe.send((test.__module__, test.__qualname__, arguments))
        results = self._results()
        for rank, (output, _) in sorted(results.items()):
            print(f"rank {rank}:", output, sep="\n")
        errors = {rank: error for rank, (_, error) in results.items() if error}
        errors |= dict.fromkeys(range(self.world) - results.keys(), "did not finish in time")
        if errors:
            self.close()
            pytest.fail("\n".join(f"rank {rank}: {error}" for rank, error in sorted(errors.items())), pytrace=False)

    def _results(self) -> dict[int, tuple[str, str | None]]:
        """For each rank that ended in time, what it printed, and its error."""
        results: dict[int, tuple[str, str | None]] = {}
        deadline = time.monotonic() + SECONDS
        while waiting := {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in results}:
            ready = connection.wait(waiting, max(deadline - time.monotonic(), 0))
            if not ready:
                break
            for pipe in ready:
                try:
                    results[waiting[pipe]] = pipe.recv()
                except (EOFError, ConnectionError):
                    process = self.processes[waiting[pipe]]
                    process.join(GRACE)
                    results[waiting[pipe]] = "", f"ended with exit code {process.exitcode}"
            if any(error for _, error in results.values()):
                deadline = min(deadline, time.monotonic() + GRACE)
        return results

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.processes, self.pipes = [], []


def _serve(rank: int, world: int, meeting: str, pipe: connection.Connection) -> None:
    """Run the tests that come through the pipe."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=world, init_method=f"file://{meeting}", timeout=timedelta(seconds=TIMEOUT)
    )
    while True:
        try:
            module, name, arguments = pipe.recv()
        except EOFError:
            sys.exit()
        torch.manual_seed(rank)
        error = None
        with redirect_stdout(StringIO()) as output:
            try:
                getattr(importlib.import_module(module), name)(**arguments)
            except BaseException:
                error = traceback.format_exc()
        pipe.send((output.getvalue(), error))
