"""Which formats a GPU can multiply."""

import pytest
import torch

from halo_tensor.kernels import device
from halo_tensor.recipe import FP8_E4M3, INT8


@pytest.mark.parametrize(
    ("capability", "formats", "message"),
    [
        ((8, 0), (FP8_E4M3,), r"Tesla X has compute capability 8.0 .*fp8_e4m3.*halo_config\(level=1, dtype='int8'\)"),
        ((7, 5), (INT8,), "int8.*bf16 or fp16 only"),
    ],
)
def test_devices_that_cannot_run_a_format(monkeypatch, capability, formats, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla X")
    with pytest.raises(RuntimeError, match=message):
        device.check_device(formats, torch.device("cuda"))
    device.check_device((), torch.device("cuda"))
    device.check_device(formats, torch.device("cpu"))


@pytest.mark.parametrize(("capability", "expected"), [((8, 9), False), ((9, 0), True), ((12, 0), True)])
def test_which_gpus_start_kernels_early(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert device.has_dependent_launches(torch.device("cuda")) == expected
    assert not device.has_dependent_launches(torch.device("cpu"))
