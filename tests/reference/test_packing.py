"""fp6 weights in 0.75 bytes an element."""

import pytest
import torch
from torch import nn
from torch.distributed._tools.common_utils import get_untyped_storages

from halo_tensor import halo_config, quantize_
from halo_tensor.recipe import FP6_E2M3, FP6_E3M2
from halo_tensor.reference import codes as formats
from halo_tensor.reference.packing import pack_rows, unpack_columns, unpack_rows
from tests.helpers.recording import OpLog, saved_bytes


@pytest.mark.parametrize("format", [FP6_E2M3, FP6_E3M2], ids=str)
def test_every_code_survives(format):
    codes = formats.from_bits(torch.arange(64, dtype=torch.uint8).roll(5).repeat(3, 1), format)
    packed = pack_rows(codes, format)
    assert packed.shape == (3, 48) and packed.dtype == torch.uint8
    for unpacked in (unpack_rows(packed, format), unpack_columns(packed, format).t()):
        assert torch.equal(unpacked.contiguous().view(torch.uint8), codes.view(torch.uint8)), "the sign of zero included"
    assert unpack_columns(packed, format).is_contiguous()


def frozen_pair(level: int) -> tuple[nn.Linear, nn.Linear]:
    """The same layer with packed codes, and with a byte for each (held for training)."""
    packed, bytes_ = nn.Linear(256, 128), nn.Linear(256, 128)
    bytes_.load_state_dict(packed.state_dict())
    quantize_(packed.requires_grad_(False), halo_config(level, "fp6"))
    quantize_(bytes_, halo_config(level, "fp6"))
    assert packed.weight.operand.is_packed and not bytes_.weight.operand.is_packed
    return packed, bytes_


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_packed_weight_computes_the_same_in_three_quarters_of_the_bytes(level):
    packed, bytes_ = frozen_pair(level)
    held = sum(s.nbytes() for s in get_untyped_storages(packed.weight))
    assert held == 256 * 128 * 3 // 4 + 128 * 4 and held <= 0.40 * 256 * 128 * 2
    x, e = torch.randn(64, 256, requires_grad=True), torch.randn(64, 128)
    with OpLog() as log:
        y = packed(x)
    assert log.products() == [torch.float8_e4m3fn]
    assert torch.equal(y, bytes_(x))
    assert torch.equal(*(torch.autograd.grad(layer(x), x, e)[0] for layer in (packed, bytes_)))
    assert torch.equal(packed.weight.dequantize(), bytes_.weight.operand.dequantize())


def test_a_packed_weight_can_be_written_and_moved():
    packed, _ = frozen_pair(1)
    before = packed.weight.dequantize()
    assert packed.weight.to(torch.bfloat16).operand.is_packed
    storage = packed.weight.operand.codes
    packed.weight.data += 1
    assert packed.weight.operand.codes is storage and packed.weight.operand.is_packed
    error = (packed.weight.dequantize() - before - 1).abs().max()
    assert 1e-4 < error < 0.2


def test_a_compiled_graph_saves_the_packed_bytes_only():
    model = nn.Sequential(nn.Linear(256, 512), nn.SiLU(), nn.Linear(512, 256)).requires_grad_(False)
    quantize_(model, halo_config(1, "fp6"))
    f = torch.compile(model, fullgraph=True)
    x = torch.randn(64, 256, requires_grad=True)
    with torch._functorch.config.patch(enable_autograd_cache=False), saved_bytes() as saved:
        y = f(x)
    assert saved(model) == 64 * 512 * 4, "what enters SiLU; no codes"
    torch.testing.assert_close(y, model(x))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(model(x).sum(), x))
