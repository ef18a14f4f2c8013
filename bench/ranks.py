"""Shared code of the benchmarks that run on several ranks: options, the process group, times, and turns of contenders."""

import argparse
import gc
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import results
import torch
import torch.distributed as dist
from contenders import CONTENDERS
from steps import CUDA

#: What ``--tiny`` sets.
TINY = {"blocks": 2, "hidden": 128, "intermediate": 256, "batch": 1, "length": 64, "warmup": 2, "steps": 2}


def parser_of(description: str, contenders: list[str], warmup: int, more: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    """Return a parser of the options that these benchmarks share.

    Args:
        description: of the script.
        contenders: the default ones.
        warmup: how many steps come before the first that is timed, by default.
        more: names of contenders that the script itself knows.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--contenders", nargs="+", default=contenders, choices=[*CONTENDERS, *more], metavar="NAME")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--batch", type=int, default=2, help="sequences per GPU, or of all that share them")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--warmup", type=int, default=warmup, help="steps before the first that is timed")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a dry run on a CPU too")
    return parser


def title(of: str, args: argparse.Namespace, per: str = "per GPU") -> str:
    """Return the title of a table. ``of``: what is timed; ``per``: what the tokens are of."""
    devices = f"{dist.get_world_size()} {'GPUs' if CUDA else 'processes of a CPU'}"
    return f"{of} on {devices}, {args.blocks} blocks of {args.hidden}, {args.batch}×{args.length} tokens {per}"


@contextmanager
def process_group(script: str, tiny: bool) -> Iterator[torch.device]:
    """Make the process group for the block, and yield this rank's device.

    Args:
        script: its name, for the message that ends a call without torchrun or GPUs.
        tiny: whether a CPU will do.
    """
    if "LOCAL_RANK" not in os.environ or not (CUDA or tiny):
        sys.exit(f"bench/{script} needs CUDA devices and torchrun: torchrun --standalone --nproc-per-node 2 bench/{script}")
    device = torch.device("cpu")
    if CUDA:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if CUDA else "gloo", device_id=device if CUDA else None)
    yield device
    dist.destroy_process_group()


class Timed(NamedTuple):
    """What steps took on the slowest rank: their median in ms, the ms to issue one, and the GiB at the peak (0 on a CPU)."""

    ms: float
    issue: float
    peak: float


def timed(step: Callable[[], None], count: int, device: torch.device) -> Timed:
    """Time ``count`` steps on all ranks."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    dist.barrier()
    ms = _milliseconds(step, count)
    peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0
    issue = statistics.median(_alone(step) for _ in range(5))
    slowest = torch.tensor([ms, issue, peak], device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return Timed(*slowest.tolist())


def _milliseconds(step: Callable[[], None], count: int) -> float:
    """Return the median time of ``count`` consecutive steps."""
    if not CUDA:
        return statistics.median(_alone(step) for _ in range(count))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def _alone(step: Callable[[], None]) -> float:
    """Return the milliseconds until a step that starts on an idle device has been issued."""
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


def reference(rows: list[dict], name: str, ms: float) -> float | None:
    """Return the ms of bf16, with which a contender that took ``ms`` is compared; None if it was not timed."""
    return next((row["ms"] for row in rows if row["contender"] == "bf16"), ms if name == "bf16" else None)


def take_turns(
    args: argparse.Namespace,
    title: str,
    notes: str,
    expected: Iterable[str],
    row_of: Callable[[str, list[dict]], dict[str, Any]],
) -> None:
    """Measure the contenders one after another, and write the table after each.

    Args:
        args: of :func:`parser_of`, and of ``results.add_arguments``.
        title, notes: of the table.
        expected: contenders of which the table should have a row.
        row_of: measures a contender and returns its row. It gets its name and the rows before.
    """
    rows: list[dict] = []
    first, why_not = dist.get_rank() == 0, {(name,): results.ENDED for name in args.contenders}
    for name in args.contenders:
        try:
            row = row_of(name, rows)
        except Exception as error:  # all ranks run the same code, so all of them fail
            print(f"rank {dist.get_rank()}, {name}: {error!r:.2000}", flush=True)
            why_not[(name,)] = results.reason(error)
        else:
            rows.append(row)
            if first:
                print(row, flush=True)
        finally:
            torch._dynamo.reset()
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()
        if first and rows:
            results.write(args.name, title, rows, notes, args.folder, quiet=True, expected=expected, why_not=why_not)
