"""Compile kernels in other threads, ahead of their first launches.

Most of a compilation runs without Python's global lock: the passes of MLIR and LLVM, and ptxas in a process of its own.
Triton's ``AsyncCompileMode`` compiles in threads, too.
"""

import os
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from threading import Lock
from typing import TypeVar

T = TypeVar("T")

#: What is being compiled -> what tells of its end.
_under_way: dict[Hashable, Future] = {}
_lock = Lock()


@lru_cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="halo_tensor")


def start(compile: Callable[[], object]) -> None:
    """Call a function in another thread. Its errors are dropped: who needs the kernel compiles it once more."""
    _threads().submit(compile)


def one_at_a_time(what: Hashable, compile: Callable[[], T]) -> T:
    """Return ``compile()``. If another thread compiles the same, wait for that first, so that Triton finds the kernel."""
    with _lock:
        other = _under_way.get(what)
        mine = _under_way.setdefault(what, Future())
    if other is not None:
        wait([other])
        return compile()
    try:
        return compile()
    finally:
        with _lock:
            del _under_way[what]
        mine.set_result(None)
