"""The kernels of a graph are compiled before the graph runs."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._inductor.async_compile import AsyncCompile

pytest.importorskip("triton")
from halo_tensor import halo_config, hot_config, quantize_
from halo_tensor.fences.fast_paths import AHEAD
from halo_tensor.kernels import ahead
from halo_tensor.kernels.launch import Launch, SizedLaunch
from tests.helpers import interpreter
from tests.helpers.generated_code import lowered_again
from tests.helpers.interpreter import DEVICE, runs_kernels


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=4)


def what(launch: Launch, sizes, dtypes) -> tuple:
    return launch.kernel.fn.__name__, repr(launch.constants), sizes.kinds, tuple(dtypes)


@pytest.fixture
def started(monkeypatch):
    """What was to be compiled ahead. Bodies of ops run in another thread, which has no fake tensors."""
    found, threads = [], ThreadPoolExecutor(1)
    monkeypatch.setattr(AHEAD, "enabled", True)
    # C++ takes longest, and what Inductor's own kernels compute changes no launch.
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda self, *args, **options: lambda *pointers: None)
    monkeypatch.setattr(ahead, "start", lambda compile: threads.submit(compile).result())
    monkeypatch.setattr(
        SizedLaunch, "ahead", lambda self, device, dtypes: found.append(what(self.launch, self.sizes, dtypes)) or self
    )
    return found


@pytest.fixture
def launched(monkeypatch):
    found, call = [], Launch.__call__

    def noting(self, sizes, *tensors):
        if isinstance(tensors[0], torch.Tensor):
            found.append(what(self, sizes, [t.dtype for t in tensors]))
        call(self, sizes, *tensors)

    monkeypatch.setattr(Launch, "__call__", noting)
    return found


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(128, 256), nn.Linear(128, 256), nn.Linear(256, 128)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@runs_kernels
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("config", [halo_config(1, "int8"), hot_config()], ids=["HALO-1", "HOT"])
def test_every_kernel_is_compiled_ahead(started, launched, config, dynamic):
    torch._dynamo.reset()
    model, x = Gated().to(DEVICE, torch.bfloat16), torch.randn(20, 128, device=DEVICE, dtype=torch.bfloat16)
    quantize_(model, config)
    launched.clear()
    with lowered_again():
        torch.compile(model, fullgraph=True, dynamic=dynamic)(x.requires_grad_()).sum().backward()
    assert len(set(launched)) >= 7
    assert set(started) == set(launched), "and no other"
