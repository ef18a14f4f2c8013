import os

import hypothesis
import pytest
import torch

# Reproducible by default; HYPOTHESIS_PROFILE=explore looks for new examples.
hypothesis.settings.register_profile("default", deadline=None, max_examples=30, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=300)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


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
