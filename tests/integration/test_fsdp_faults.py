"""A rank that dies or stands still in a collective of an FSDP2 step ends the other rank with an error, and not with a wait.

All pairs of ranks run at the same time, since most of their time is spent waiting.
"""

import os
import signal
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from halo_tensor import HadamardQuantTensor, HaloWeight, halo_config
from halo_tensor.fsdp import precompute_scales
from tests.helpers.ranks import context
from tests.helpers.sharded import EVEN, UNEVEN, make, shard

TIMEOUT = 15  # of the process group, in seconds
SECONDS = 30  # from a rank's end to the other's
STARTING = 240  # on a busy machine
GATHER, REDUCE, SCATTER = "_allgather_base_", "allreduce_", "_reduce_scatter_base_"
#: Where rank 1 ends -> the collective's name, the dtype that it sends, and the part of the step that it belongs to.
PLACES = {
    "the check that ranks agree": (GATHER, torch.int64, "first step"),
    "the all-gather of codes": (GATHER, torch.uint8, "step"),
    "the all-gather of uneven shards' scales": (GATHER, torch.float32, "step"),
    "the reduce-scatter of gradients": (SCATTER, torch.float32, "step"),
    "the all-reduce of a weight's scale": (REDUCE, torch.float32, "step"),
    "precompute_scales": (REDUCE, torch.float32, "precompute"),
    "a checkpoint's plan": (None, None, "save"),
}
#: Where it stands still instead: the library's own collectives have the process group's timeout.
STOPS = ["the check that ranks agree", "the all-gather of uneven shards' scales", "precompute_scales"]
FAULTS = [(place, signal.SIGKILL) for place in PLACES] + [(place, signal.SIGSTOP) for place in STOPS]


class _Fault(TorchDispatchMode):
    """Sends this process a signal when it is about to take part in a collective."""

    def __init__(self, name: str | None, dtype: torch.dtype | None, number: int, folder: Path):
        super().__init__()
        self.name, self.dtype, self.number, self.folder = name, dtype, number, folder

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, HadamardQuantTensor | HaloWeight | DTensor) for t in types):
            return NotImplemented
        if func.namespace == "c10d" and self.name in (None, func._opname) and self._sends(args):
            (self.folder / "reached").write_text(f"{time.time()} {func._opname}")
            os.kill(os.getpid(), self.number)
        return func(*args, **(kwargs or {}))

    def _sends(self, args) -> bool:
        tensor = args[0][0] if isinstance(args[0], list) else args[0]
        return self.dtype in (None, getattr(tensor, "dtype", None))


def _rank(rank: int, place: str, number: int, folder: str) -> None:
    torch.set_num_threads(1)
    path = Path(folder)
    dist.init_process_group(
        "gloo", rank=rank, world_size=2, init_method=f"file://{path}/meeting", timeout=timedelta(seconds=TIMEOUT)
    )
    name, dtype, part = PLACES[place]
    config = halo_config(1, "int8", granularity="tensor" if name == REDUCE else "row")
    model = shard(make(config, UNEVEN if "uneven" in place else EVEN))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randn(8, model[-1].weight.shape[1])

    def step():
        model(x).square().mean().backward()
        optimizer.step()

    def save():
        dcp.save(get_model_state_dict(model), checkpoint_id=path / "checkpoint")

    parts = {"first step": step, "step": step, "precompute": lambda: precompute_scales(model), "save": save}
    try:
        if part != "first step":
            step()
        if rank == 1:
            with _Fault(name, dtype, number, path):
                parts[part]()
            (path / "missed").touch()
        else:
            parts[part]()
            step()
        (path / f"survived-{rank}").touch()
    except BaseException:
        (path / f"error-{rank}").write_text(traceback.format_exc())
        raise
    finally:
        (path / f"ended-{rank}").write_text(str(time.time()))


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """For each fault, its folder and the exit code of rank 0; None if it was still running."""
    made, running = context(), {}
    for fault in FAULTS:
        folder = tmp_path_factory.mktemp("fault")
        ranks = [made.Process(target=_rank, args=(rank, *fault, str(folder)), daemon=True) for rank in range(2)]
        for rank in ranks:
            rank.start()
        running[fault] = folder, ranks
    deadline, results = time.monotonic() + STARTING + SECONDS, {}
    for fault, (folder, ranks) in running.items():
        ranks[0].join(max(deadline - time.monotonic(), 0))
        results[fault] = folder, ranks[0].exitcode
    for _, ranks in running.values():
        for rank in ranks:
            rank.kill()
            rank.join()
    return results


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{signal.Signals(f[1]).name}: {f[0]}")
def test_a_rank_that_ends_in_a_collective_ends_the_other(fault, ended):
    folder, code = ended[fault]
    error = (folder / "error-0").read_text() if (folder / "error-0").exists() else ""
    reached = (folder / "reached").read_text() if (folder / "reached").exists() else ""
    assert reached and not (folder / "missed").exists(), f"rank 1 did not come to {fault[0]}\n{error}"
    assert code is not None, f"rank 0 waits for rank 1, which ended in {reached.split()[1]}"
    assert code != 0 and not (folder / "survived-0").exists()
    waited = float((folder / "ended-0").read_text()) - float(reached.split()[0])
    assert waited < SECONDS
    words = ("closed by peer", "reset by peer") if fault[1] == signal.SIGKILL else ("Timed out", "timeout")
    assert any(word in error for word in words), error
    if fault[1] == signal.SIGSTOP:
        assert waited > TIMEOUT / 2, "it is the process group's timeout that ends the wait"
