"""The definitions of experts' ops, against float64 and autograd."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halo_tensor.recipe import Gate
from halo_tensor.reference import experts
from tests.helpers.expert_layers import GPT_OSS, activate64, offsets


@given(sizes=st.lists(st.integers(0, 300), min_size=1, max_size=6), rest=st.integers(0, 200))
def test_tiles_cover_every_row_once(sizes, rest):
    rows = sum(sizes) + rest
    tiles, starts = experts.group_tiles(offsets(sizes), rows)
    assert tiles.shape == (experts.tile_count(rows, len(sizes)), 4)
    expert_of = [e for e, size in enumerate(sizes) for _ in range(size)] + [-1] * rest
    covered = [(row, expert) for expert, first, end, _ in tiles.tolist() for row in range(first, end)]
    assert covered == list(enumerate(expert_of))
    assert all(end - first <= experts.TILE for _, first, end, _ in tiles.tolist())
    for expert, size in enumerate(sizes):
        mine = tiles[starts[expert] : starts[expert + 1]]
        assert len(mine) == -(-size // experts.TILE) and (mine[:, 0] == expert).all()
    assert (tiles[starts[-1] :, 1] == tiles[starts[-1] :, 2]).all(), "what is not needed has no rows"


@pytest.mark.parametrize("gate", [Gate(), GPT_OSS, Gate(limit=0.7), Gate(alpha=1.3, shift=0.5, interleaved=True)], ids=str)
def test_a_gate_and_its_derivative(gate):
    torch.manual_seed(0)
    h, weight = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((9, 24), (9,)))
    grad = torch.randn(9, 12, dtype=torch.float64)
    a = activate64(h, gate) * weight.unsqueeze(1)
    expected = torch.autograd.grad(a, [h, weight], grad)
    got = experts.activate_backward(h.detach().float(), grad.float(), weight.detach().float(), gate)
    for x, y in zip(
        (experts.activate(h.detach().float(), gate), *got), (activate64(h.detach(), gate), *expected), strict=True
    ):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


def test_gpt_oss_has_this_gate():
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    from transformers import GptOssConfig

    config = GptOssConfig(hidden_size=16, intermediate_size=16, num_local_experts=2)
    module = modeling.GptOssExperts(config)
    h = torch.randn(7, 32) * 6
    torch.testing.assert_close(experts.activate(h, GPT_OSS), module._apply_gate(h))


@given(
    st.builds(
        Gate,
        st.floats(0.1, 3),
        st.none() | st.floats(0.5, 9),
        st.sampled_from([0.0, 1.0]),
        st.booleans(),
    )
)
def test_a_gate_crosses_the_dispatcher(gate):
    assert Gate.of(str(gate)) == gate


def test_a_limit_must_be_positive():
    with pytest.raises(ValueError, match="limit must be positive"):
        Gate(limit=0.0)
