"""Shared code of the benchmarks of training steps. Every contender compiles from empty caches and is freed after its turn."""

import functools
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import results
import torch
from torch import nn
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import fresh_cache
from triton.runtime.jit import JITFunction
from triton.testing import do_bench, do_bench_cudagraph

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
#: A run on a CPU only shows that a benchmark works, so it does not wait for a C++ compiler.
BACKEND = "inductor" if CUDA else "aot_eager"


@dataclass
class Measured:
    """What the steps of one contender took.

    Attributes:
        ms: median of plain calls.
        graph_ms: median of replays of a CUDA graph.
        saved: GiB saved for backward.
        peak: GiB at the peak of a step.
        first: seconds of the first two steps.
    """

    ms: float
    graph_ms: float | None
    saved: float | None
    peak: float | None
    first: float

    def columns(self, reference: "Measured | None", tokens: int) -> dict:
        """Return the columns of a table with times of both plain calls and graphs."""
        return {
            "ms": round(self.ms, 2),
            "× bf16": results.speedup(reference and reference.ms, self.ms),
            "graph ms": self.graph_ms and round(self.graph_ms, 2),
            "× bf16 (graph)": results.speedup(reference and reference.graph_ms, self.graph_ms),
            "tokens/s": round(1e3 * tokens / self.ms),
        }

    def memory(self) -> dict:
        return {"saved GiB": self.saved and f"{self.saved:.2f}", "peak GiB": self.peak and f"{self.peak:.2f}"}


def need_cuda(script: str) -> None:
    if not CUDA:
        sys.exit(f"bench/{script} needs a CUDA device")


def warm_up() -> None:
    """Compile something, so that no contender pays for what the first compilation of a process sets up."""
    torch.compile(nn.Linear(64, 64, device=DEVICE), backend=BACKEND)(torch.ones(64, 64, device=DEVICE)).sum().backward()
    if CUDA:
        AsyncCompile.wait_pool_ready()


def take_turn(name: str, measure: Callable, *args) -> tuple[Any, str]:
    """Return the result of ``measure(name, *args)`` from empty caches and "", or None and why it failed."""
    with fresh_cache():
        try:
            return measure(name, *args), ""
        except Exception as error:
            print(f"{name}: {error!r:.300}", flush=True)
            return None, results.reason(error)
        finally:
            forget()


def forget() -> None:
    """Free the memory of a contender, and the kernels that this library compiled for it.

    ``fresh_cache`` frees the kernels of Inductor.
    """
    torch._dynamo.reset()
    for module in [module for name, module in sys.modules.items() if name.startswith("halo_tensor")]:
        for value in vars(module).values():
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()
            elif isinstance(value, JITFunction):
                value.device_caches.clear()
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def allocated() -> int:
    return torch.cuda.memory_allocated() if CUDA else 0


def check_gradients(model: nn.Module) -> None:
    missing = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, f"no gradient for {missing}"


def measure_steps(
    step: Callable[[], None], forward: Callable[[], torch.Tensor], others: int, reps: int, graph: bool
) -> Measured:
    """Measure steps of one contender. On a CPU only times are measured.

    Args:
        step: a whole step.
        forward: the forward of ``step``, which shows what it saves for backward.
        others: bytes that were allocated before the contender was made.
        reps: milliseconds of repetitions.
        graph: also time replays of a CUDA graph.
    """
    start = time.perf_counter()
    for _ in range(2):
        step()
        if CUDA:
            torch.cuda.synchronize()
    first = time.perf_counter() - start
    if not CUDA:
        start = time.perf_counter()
        step()
        return Measured(1e3 * (time.perf_counter() - start), None, None, None, first)
    before = torch.cuda.memory_allocated()
    y = forward()
    saved = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    del y
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() - others
    plain, replayed = do_bench(step, warmup=200, rep=reps, return_mode="median"), None
    if graph:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                replayed = do_bench_cudagraph(step, rep=reps, return_mode="median")
        except Exception as error:
            print(f"as a CUDA graph: {error!r:.300}")
    return Measured(plain, replayed, saved / 2**30, peak / 2**30, first)
