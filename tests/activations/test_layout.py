"""The order of a tensor's elements in memory."""

import pytest
import torch

from halo_tensor.activations.layout import in_memory_order, inverse, memory_order

LAYOUTS = {
    "contiguous": (torch.arange(24).view(2, 3, 4), [0, 1, 2]),
    "heads": (torch.arange(48).view(2, 3, 4, 2).transpose(1, 2), [0, 2, 1, 3]),
    "transposed": (torch.arange(6).view(2, 3).t(), [1, 0]),
    "channels last": (torch.arange(48).view(2, 3, 2, 4).contiguous(memory_format=torch.channels_last), [0, 2, 3, 1]),
    "one row": (torch.arange(4).view(1, 4), [0, 1]),
    "a slice": (torch.arange(24).view(4, 6)[:, :3], None),
    "expanded": (torch.arange(4).view(1, 4).expand(3, 4), None),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_order(name):
    x, expected = LAYOUTS[name]
    order = memory_order(x.shape, x.stride())
    assert order == expected
    flat, _ = in_memory_order(x)
    assert flat.is_contiguous()
    if order is None:
        assert torch.equal(flat, x)
    else:
        assert flat.data_ptr() == x.data_ptr() and torch.equal(flat.permute(inverse(order)), x)
