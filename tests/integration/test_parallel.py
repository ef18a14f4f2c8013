"""torch's own styles of tensor parallelism are refused, not computed in high precision."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from halo_tensor import halo_config, quantize_


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("style", [ColwiseParallel, RowwiseParallel])
def test_a_product_with_a_part_of_a_weight_is_refused(mesh, style):
    model = nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 128))
    x = torch.randn(4, 128)
    parallelize_module(model, mesh, {"0": style()})
    model(x)
    model = nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 128))
    quantize_(model, halo_config(1, "int8"))
    parallelize_module(model, mesh, {"0": style()})
    with pytest.raises(
        ValueError, match=r"a part, .* as in torch's ColwiseParallel .* not supported: use HaloColwiseParallel"
    ):
        model(x)


@pytest.mark.parametrize("dim", [0, 1])
def test_chunks_of_a_weight_are_refused_and_writable(dim):
    layer = nn.Linear(128, 256, bias=False)
    quantize_(layer, halo_config(1, "int8"))
    chunk = layer.weight.detach().chunk(2, dim)[1]
    with pytest.raises(ValueError, match="a part"):
        torch.nn.functional.linear(torch.randn(2, chunk.shape[1]), chunk)
    before = layer(torch.ones(1, 128))
    chunk.zero_()
    assert not torch.equal(layer(torch.ones(1, 128)), before)
