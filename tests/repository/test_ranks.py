"""Tests that run in process groups (tests/helpers/ranks.py): each reports its own failure and hides no other."""

import multiprocessing
import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.helpers import ranks
from tests.helpers.ranks import Ranks, on_ranks


def fails_on_rank_1(world):
    print("before the failure")
    if dist.get_rank() == 1:
        raise ValueError(f"one of {world}")
    dist.barrier()


def dies_on_rank_1(world):
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def hangs(world):
    time.sleep(600)


def adds_up(world):
    ones = torch.ones(1)
    dist.all_reduce(ones)
    assert ones == world


def test_a_failure_is_of_one_test(monkeypatch, capsys):
    monkeypatch.setattr(ranks, "GRACE", 2)
    group = Ranks(2)
    try:
        for test, error in (
            (fails_on_rank_1, "rank 1: Traceback(.|\n)*ValueError: one of 2"),
            (dies_on_rank_1, "rank 1: ended with exit code 7"),
        ):
            with pytest.raises(pytest.fail.Exception, match=error):
                group.run(test, {"world": 2})
            group.run(adds_up, {"world": 2})
        processes = group.processes
        group.run(adds_up, {"world": 2})
        assert group.processes is processes, "a group that has not failed is kept"
        monkeypatch.setattr(ranks, "SECONDS", 1)
        with pytest.raises(pytest.fail.Exception, match="rank 0: did not finish in time\nrank 1: did not finish in time"):
            group.run(hangs, {"world": 2})
    finally:
        group.close()
    assert "rank 1:\nbefore the failure\n" in capsys.readouterr().out


@on_ranks(2)
@pytest.mark.parametrize("value", [3, 4])
def test_each_rank_is_a_process(world, value, tmp_path):
    """The ranks have the arguments of the test, and each has its own seed."""
    assert multiprocessing.parent_process() is not None
    (tmp_path / f"{value} of {dist.get_rank()}").touch()
    dist.barrier()
    assert len(list(tmp_path.iterdir())) == world
    drawn = [torch.empty(1) for _ in range(world)]
    dist.all_gather(drawn, torch.rand(1))
    assert drawn[0] != drawn[1]
