"""A process with TRITON_INTERPRET=1 that forks for each module whose tests are to run in it: a script for tests/helpers/interpreter.py.

It imports what they share once. For each line of its input, a JSON list of pytest's arguments and of the file for their output,
it writes pytest's exit code.
"""

import gc
import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
import hypothesis  # noqa: F401
import setuptools  # noqa: F401  before torch: see tests/conftest.py
import triton  # noqa: F401

import halo_tensor.compiler.inductor
import halo_tensor.kernels.matmul.plan  # noqa: F401


def serve() -> None:
    gc.freeze()  # a fork that walks through all objects would copy their memory
    for line in sys.stdin:
        arguments, output = json.loads(line)
        pid = os.fork()
        if pid == 0:
            with open(output, "wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            code = pytest.main(arguments)
            sys.stdout.flush()
            os._exit(code)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
