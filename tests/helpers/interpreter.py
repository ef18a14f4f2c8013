"""Triton's interpreter, which runs kernels on a CPU.

The environment variable that chooses it is read when Triton is imported, so tests that need it run in a separate process.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
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

    from halo_tensor.kernels.launch import Launch, Sizes

    ReduceOps.generic_reduce = reduce_by_halves
    launch = Launch.__call__

    def launch_compiled(self: Launch, sizes: Sizes, *tensors):
        """Launch, unless the kernel would be compiled for other dtypes: on a GPU it would read the wrong bytes."""
        dtypes = [t.dtype for t in tensors]
        compiled_for = self.__dict__.setdefault("compiled for", dtypes)
        assert dtypes == compiled_for, f"{self.kernel.fn.__name__} would be compiled for {compiled_for} and gets {dtypes}"
        launch(self, sizes, *tensors)

    Launch.__call__ = launch_compiled


@cache
def server() -> subprocess.Popen:
    """The process of tests/helpers/interpreter_server.py, which ends with this one."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", str(Path(__file__).with_name("interpreter_server.py"))]
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def run(module: str, at_least: int) -> None:
    """Run the tests of a module in the interpreter. All must pass, and at least ``at_least`` must run."""
    arguments = [module, "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    with tempfile.NamedTemporaryFile("r") as output:
        print(json.dumps([arguments, output.name]), file=server().stdin, flush=True)
        code = server().stdout.readline().strip()
        printed = output.read()
    passed = re.search(r"(\d+) passed", printed)
    assert code == "0" and passed and int(passed[1]) >= at_least, printed[-12000:]
