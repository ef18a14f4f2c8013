"""Which products cuBLAS computes, and the scales that it is given."""

import pytest
import torch

pytest.importorskip("triton")
from halo_tensor.kernels.matmul import cublas
from halo_tensor.kernels.matmul.request import Request, size_class
from halo_tensor.recipe import Rotation
from tests.helpers.interpreter import DEVICE, runs_kernels


def test_scales_of_one_are_float32():
    """Whatever PyTorch makes by default, and keeps making after that."""
    cublas._cached_ones.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert cublas._ones(4, torch.device("cpu")).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@runs_kernels
def test_which_products_are_the_vendors(monkeypatch):
    monkeypatch.setattr(cublas, "is_hopper", lambda device: True)
    monkeypatch.setattr(cublas, "_multiplies", lambda device: True)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    size = size_class(8192, 8192, 132)
    served = Request(DEVICE, e4m3, e4m3, 8192, 2, 0, False, None, None, None, torch.bfloat16, size._replace(vendor=True))
    assert cublas.why_not(served) is None
    for other in (
        {"gain": True}, {"bias": torch.bfloat16}, {"row_rotation": Rotation(128)}, {"column_rotation": Rotation(128)},
        {"a_scale": 1}, {"dtype": torch.float32}, {"a": e5m2}, {"b": e5m2}, {"b": torch.int8}, {"n": 8200}, {"size": size},
    ):  # fmt: skip
        assert cublas.why_not(served._replace(**other)) is not None, other
    assert cublas.is_faster(8192, 8192, 4096, 4096, 4096)
    for m, k, *strides in ((8192, 4096, 4112, 4096), (8192, 4096, 4096, 4112), (512, 4096), (8192, 4104)):
        assert not cublas.is_faster(m, 8192, k, *(strides or (k, k)))
    assert not any(cublas.is_faster(8192, 8192, k, k, k) for k in (512, 16384))
