import inspect
import os

import hypothesis
import pytest
import setuptools  # noqa: F401  Inductor imports it, and in the midst of a test it may find the standard library's distutils
import torch

pytest.register_assert_rewrite("tests.helpers")

# Reproducible by default; HYPOTHESIS_PROFILE=explore looks for new examples.
hypothesis.settings.register_profile("default", deadline=None, max_examples=30, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=300)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Inductor compiles a program for each instruction set of the CPU and loads it in a new process, once for each process of ours.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_collection_modifyitems(items):
    # First, and so side by side: pytest-xdist then gives them to one worker, which starts each process group once.
    items.sort(key=lambda item: "ranks" not in item.fixturenames)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def ranks(world):
    """A process group of the size that :func:`tests.helpers.ranks.on_ranks` asks for."""
    from tests.helpers.ranks import Ranks

    group = Ranks(world)
    yield group
    group.close()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Tests that have the fixture ``ranks`` are called in its processes."""
    group = pyfuncitem.funcargs.get("ranks")
    if group is None:
        return None
    group.run(pyfuncitem.obj, {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters})
    return True


@pytest.fixture(autouse=True, scope="session")
def _older_gpu():
    """HALO_RUN_AS=89 runs the kernels of an RTX 4090 on the GPU that is there: see tests/helpers/older_gpu.py."""
    if capability := os.environ.get("HALO_RUN_AS"):
        from tests.helpers.older_gpu import running_as

        with running_as(int(capability)):
            yield
    else:
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_predictions(request, monkeypatch):
    """Let this machine's GPU be one of unknown rates: the layers of tests are so small that all are predicted to lose, and
    ``quantize_`` would warn. The fixture ``machine`` gives this machine another GPU."""
    if torch.cuda.is_available() and "machine" not in request.fixturenames:
        from halo_tensor.analysis import gpus

        monkeypatch.setattr(gpus, "name_of", lambda device: "")


@pytest.fixture
def machine(monkeypatch):
    """Return a function that gives this machine a GPU and a version of Triton."""
    import triton

    def give(name: str, capability: tuple[int, int], version: str = "3.6.0") -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(triton, "__version__", version)

    return give
