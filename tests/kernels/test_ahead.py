"""Kernels that are compiled in other threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from halo_tensor.kernels import ahead


def test_threads_wait_for_each_other():
    """Of two that want the same kernel, one compiles it, and then the other finds it. A third wants another one."""
    entered, others, order = threading.Event(), threading.Event(), []

    def first():
        entered.set()
        assert others.wait(10)
        order.append("compiled")

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(ahead.one_at_a_time, "kernel", first)
        assert entered.wait(10)
        two = pool.submit(ahead.one_at_a_time, "kernel", lambda: order.append("found"))
        ahead.one_at_a_time("another", lambda: order.append("another"))
        assert not two.done()
        others.set()
        one.result(10), two.result(10)
    assert order == ["another", "compiled", "found"]
    assert not ahead._under_way


def test_an_error_is_its_callers_alone():
    def fail():
        raise RuntimeError("ptxas")

    with pytest.raises(RuntimeError, match="ptxas"):
        ahead.one_at_a_time("kernel", fail)
    assert ahead.one_at_a_time("kernel", lambda: 3) == 3
    done = threading.Event()
    ahead.start(fail)
    ahead.start(done.set)
    assert done.wait(10)
