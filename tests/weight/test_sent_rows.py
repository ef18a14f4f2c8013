"""The rows of codes and scales that a shard sends."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from halo_tensor import HaloWeight, halo_config, quantize_
from halo_tensor.weight import ShardRole, fsdp_hooks
from halo_tensor.weight.sent_rows import ALIGNMENT, can_be_sent_in_rows, codes_in, put_in_rows, row_bytes, rows_of, scales_in


def shard_of(dtype: str, rows: int = 6, width: int = 64, granularity: str = "row") -> tuple[nn.Linear, HaloWeight]:
    """A layer, and the first half of its weight as FSDP2 makes it."""
    torch.manual_seed(0)
    linear = nn.Linear(width, 2 * rows, bias=False)
    quantize_(linear, halo_config(1, dtype, min_features=0, granularity=granularity), filter_fn=lambda *_: True)
    with torch.no_grad():
        padded = linear.weight.new_zeros((rows, width))
        shard = padded.narrow(0, 0, rows)
        shard.copy_(linear.weight.chunk(2)[0])
    fsdp_hooks._agreed.add(linear)  # there is no other rank to ask
    return linear, shard


def send(linear: nn.Linear, shard: HaloWeight) -> tuple[tuple[torch.Tensor, ...], dict]:
    two_ranks = SimpleNamespace(size=lambda: 2)
    with torch.no_grad():
        return shard.fsdp_pre_all_gather(two_ranks, linear.weight.shape, linear.weight.stride(), linear, None)


@given(st.integers(1, 5000))
def test_a_row_has_room_for_codes_and_a_scale(width):
    assert width + 4 <= row_bytes(width) <= width + 16 + 4 + ALIGNMENT and row_bytes(width) % ALIGNMENT == 0


@given(st.integers(1, 5), st.integers(1, 70))
def test_codes_and_scales_do_not_meet(rows, width):
    memory = torch.zeros(rows, row_bytes(width), dtype=torch.uint8)
    codes_in(memory, width, torch.int8).fill_(-1)
    scales = scales_in(memory, width)
    assert scales.shape == (rows,) and (scales == 0).all()
    scales.fill_(3.0)
    assert (codes_in(memory, width, torch.int8) == -1).all() and (scales_in(memory, width) == 3.0).all()


WRITES = {
    "in place": lambda shard: shard.mul_(-3),
    "data": lambda shard: shard.data.mul_(-3),
    "the master's data": lambda shard: shard.lend().data.mul_(-3),
    "an optimiser": lambda shard: torch._foreach_mul_([shard, torch.ones(3)], -3),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("dtype", ["int8", "fp8", "fp6"])
def test_a_shard_sends_one_tensor_that_is_up_to_date(dtype, write):
    linear, shard = shard_of(dtype)
    assert shard.shard_role is ShardRole.SHARD
    (first,), metadata = send(linear, shard)
    assert first.dtype == torch.uint8 and first.shape == (6, row_bytes(48 if dtype == "fp6" else 64))
    for _ in range(2):
        fresh = HaloWeight.from_hp(shard.master.clone(), shard.recipe).operand.packed()
        (rows,), _ = send(linear, shard)
        assert rows is first
        assert torch.equal(codes_in(rows, metadata["width"], metadata["dtype"]).float(), fresh.codes.float())
        assert torch.equal(scales_in(rows, metadata["width"]), fresh.scale)
        assert shard.operand.codes.untyped_storage().data_ptr() == rows.data_ptr(), "codes are not copied"
        with torch.no_grad():
            WRITES[write](shard)


def test_the_gathered_weight_reads_what_was_sent():
    linear, shard = shard_of("int8")
    (rows,), metadata = send(linear, shard)
    gathered = torch.cat([rows, rows])
    weight, _ = shard.fsdp_post_all_gather((gathered,), metadata, torch.float32)
    half = shard.master.shape[0]
    assert weight.is_gathered and weight.operand.codes.data_ptr() == gathered.data_ptr()
    assert weight.scale.stride() == (1,), "kernels take no stride for scales"
    expected = HaloWeight.from_hp(torch.cat([shard.master, shard.master]), shard.recipe)
    assert torch.equal(weight.operand.dequantize(), expected.operand.dequantize())
    with torch.no_grad():
        shard.mul_(2)
    (again,), metadata = send(linear, shard)
    gathered[half:] = again  # as the next gather writes to the same memory
    assert shard.fsdp_post_all_gather((gathered,), metadata, torch.float32, out=weight) is None
    assert torch.equal(weight.scale[half:], 2 * weight.scale[:half])


def test_scales_that_have_not_changed_are_not_copied_again_in_backward():
    linear, shard = shard_of("int8")

    def gather():
        (rows,), metadata = send(linear, shard)
        weight, _ = gathered or shard.fsdp_post_all_gather((torch.cat([rows, rows]),), metadata, torch.float32)
        memory = weight.operand.codes.untyped_storage()
        torch.empty(0, dtype=torch.uint8).set_(memory, 0, (12, rows.shape[1])).copy_(torch.cat([rows, rows]))
        with torch.no_grad():
            shard.fsdp_post_all_gather((), metadata, torch.float32, out=weight)
        return weight, ()

    def gather_in_backward():
        x = torch.ones(1, requires_grad=True)
        x.register_hook(lambda gradient: (gather(), gradient)[1])
        x.sum().backward()

    gathered = None
    gathered = gather()
    weight, scales = gathered[0], gathered[0].scale.clone()
    weight.scale.fill_(7.0)  # to see what is copied
    gather_in_backward()
    assert (weight.scale == 7.0).all(), "forward has them already"
    gather()
    assert torch.equal(weight.scale, scales), "another rank may have written to its rows since the last step"
    with torch.no_grad():
        shard.mul_(2)
    gather_in_backward()
    assert torch.equal(weight.scale, 2 * scales)


def test_a_shard_that_was_copied_sends_rows_too():
    """As one that is offloaded: a copy has its codes in memory of its own."""
    linear, shard = shard_of("int8")
    copied = shard.to(torch.float64).to(torch.float32)
    assert copied.operand.codes.is_contiguous() and copied.shard_role is ShardRole.SHARD
    (rows,), _ = send(linear, copied)
    assert torch.equal(rows, send(linear, shard)[0][0])
    put_in_rows(copied.operand)
    assert rows_of(copied.operand).data_ptr() == rows.data_ptr()


def test_one_scale_for_all_rows_is_not_sent_in_them():
    _, shard = shard_of("int8", granularity="tensor")
    assert not can_be_sent_in_rows(shard.operand) and shard.operand.codes.is_contiguous()
