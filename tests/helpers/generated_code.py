"""The code that Inductor generates: its buffers and its launches."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._functorch import config as functorch_config
from torch._inductor import config
from torch._inductor.utils import run_and_get_code


@contextmanager
def lowered_again() -> Iterator[None]:
    """No graph comes from a cache. What the C++ compiler made of Inductor's own kernels does: it takes most of the time."""
    with config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        yield


def compiled(f, *args, off: str | None = None) -> tuple[list[torch.Tensor], str]:
    """Return the results of a compiled function and the generated code. ``off`` is the qualified name of a switch to set to False."""
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch, lowered_again():
        if off is not None:
            patch.setattr(off, False)
        results, (code,) = run_and_get_code(torch.compile(f, fullgraph=True), *args)
    return results, code


def calls_ops(code: str) -> bool:
    """Apart from its comments, which show the graph that it was made from."""
    return any("torch.ops.halo" in line and not line.lstrip().startswith("#") for line in code.splitlines())


def work(code: str) -> tuple[list[str], list[str]]:
    """Return the buffers that generated code allocates and the names of the kernels that it launches."""
    kernels = dict(re.findall(r"^(halo_\w+) = Launch\([\w.]*\.(\w+),", code, re.MULTILINE))
    pattern = r"empty_strided_\w+\(\((.*?),? ?\), .*, torch\.(\w+)\)|^\s+((?:cpp_fused|triton|halo)_\w+)(?:\.run)?\("
    body = code[code.index("def call(") : code.index("return (", code.index("def call("))]
    found = re.findall(pattern, body, re.MULTILINE)
    buffers = [f"{dtype}[{shape}]" for shape, dtype, name in found if dtype]
    return buffers, [kernels.get(name, "Inductor's") for _, _, name in found if name]
