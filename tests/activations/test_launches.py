"""Saved tensors that are compressed by recorded launches: the same codes, masks and strides as by ops."""

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
from halo_tensor import hot_config, ops, quantize_
from halo_tensor.activations import launches as launching
from halo_tensor.activations.packed import Mask, Packed
from halo_tensor.kernels.repeating import Program
from tests.helpers import interpreter, launches
from tests.helpers.interpreter import DEVICE, GPU, runs_kernels
from tests.helpers.recording import OpLog

#: Calls with one size: the first runs the functions, the second records them, the third repeats the recording.
CALLS = 3
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "with gaps": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "one image": lambda x: x[:1],
}


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=8)


@pytest.fixture
def repeated(monkeypatch):
    """The programs that were repeated."""
    programs, repeat = [], Program._repeat_and_write
    monkeypatch.setattr(
        Program, "_repeat_and_write", lambda self, *tensors: (programs.append(self), repeat(self, *tensors))[1]
    )
    launching._launches.cache_clear()
    yield programs
    launching._launches.cache_clear()


@runs_kernels
@pytest.mark.parametrize(("layout", "rectified"), [*((layout, False) for layout in LAYOUTS), ("channels last", True)])
def test_they_give_what_ops_give(layout, rectified, repeated, monkeypatch):
    inputs = [LAYOUTS[layout](torch.randn(2, 5, 6, 16, device=DEVICE).bfloat16()) for _ in range(CALLS)]
    if rectified:
        inputs = [x.relu() for x in inputs]
    made = [Packed(x, 8 if rectified else 6, rectified=rectified).unpack() for x in inputs]
    masks = [Mask(x).unpack() for x in inputs]
    assert len({*repeated}) == (5 if rectified else 4)
    monkeypatch.setattr(launching, "launches_on", lambda x: False)
    for x, y, mask in zip(inputs, made, masks, strict=True):
        expected = Packed(x, 8 if rectified else 6, rectified=rectified).unpack()
        assert torch.equal(y, expected) and y.stride() == expected.stride() and y.dtype == x.dtype
        assert torch.equal(mask, Mask(x).unpack()) and torch.equal(mask, (x > 0).to(x.dtype)) and mask.dtype == x.dtype
        assert 0 < (y - x).norm() < 0.1 * x.norm()
        assert layout == "with gaps" or y.stride() == mask.stride() == x.stride()


@runs_kernels
def test_masks_of_bools(repeated):
    for seed in range(CALLS):
        x = torch.rand(3, 40, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed)) > 0.4
        assert torch.equal(Mask(x).unpack(), x)
    assert len({*repeated}) == 2


@runs_kernels
def test_a_mode_sees_the_ops(monkeypatch):
    x = torch.randn(64, 32, device=DEVICE).bfloat16()
    with OpLog() as log:
        y = Packed(x, 8).unpack()
        Mask(x).unpack()
    assert [name for name, _ in log.calls if "mask" in name or "compress" in name] == [
        "compress", "decompress", "pack_mask", "unpack_mask",
    ]  # fmt: skip
    assert torch.equal(y, ops.decompress(*ops.compress(x, 8), x.shape, x.dtype))


@runs_kernels
def test_what_a_step_of_a_convolution_a_norm_and_a_relu_launches(monkeypatch):
    """Each saved tensor is compressed by one launch; nothing else is launched for it, and statistics are left alone."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)
    ).to(DEVICE, memory_format=torch.channels_last)
    quantize_(model, hot_config(activations="all"))
    x = torch.randn(4, 64, 8, 8, device=DEVICE).contiguous(memory_format=torch.channels_last)
    names = launches.noted(monkeypatch)
    y = model(x)
    first, then = ("amax_of_operands", "cast_for_operands"), ("compress_kernel", "relu_kernel")
    names.remove("fill")  # the second convolution repeats a recording, which fills its zeros in its first calls
    assert names == [*first, *then, *first]
    names.clear()
    y.square().sum().backward()
    assert names == ["dequantize_kernel", "masked_kernel", "decompress_kernel", "dequantize_kernel"]
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="C functions launch on a GPU only")
def test_all_launches_are_c_functions(repeated):
    x = torch.randn(64, 64, device=DEVICE)
    for _ in range(CALLS + 3):
        Packed(x, 8).unpack()
        Mask(x).unpack()
    assert repeated and all(step.bound for program in {*repeated} for step in program.steps)
