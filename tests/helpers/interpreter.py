"""Triton's interpreter, which runs kernels on a CPU.

The environment variable that chooses it is read when Triton is imported, so tests that need it run in a separate process.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if GPU else "cpu")

runs_kernels = pytest.mark.skipif(not (GPU or INTERPRETED), reason="see test_in_the_interpreter")

#: For the test that starts this process. On a GPU the module runs the compiled kernels instead.
runs_the_others = pytest.mark.skipif(GPU or INTERPRETED, reason="the others run")


def reduce_by_halves(self, tensors):
    """Reduce halves of a tensor at once, as a GPU does. The interpreter reduces one element after the other, which takes a second
    for each launch."""
    (x,) = tensors
    y = np.moveaxis(x.handle.data, self.axis, 0)
    while len(y) > 1:
        half = len(y) // 2
        y = self.combine_fn.fn(self.to_tensor(y[:half], x.dtype), self.to_tensor(y[half:], x.dtype)).handle.data
    return [self.to_tensor(y[0], x.dtype)]


if INTERPRETED:
    from triton.runtime.interpreter import ReduceOps

    ReduceOps.generic_reduce = reduce_by_halves


def run(module: str, at_least: int) -> None:
    """Run the tests of a module in the interpreter. All must pass, and at least ``at_least`` must run."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", module, "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) >= at_least, done.stdout[-10000:] + done.stderr[-2000:]
