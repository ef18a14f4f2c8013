"""How the config of a layer follows from measurements."""

import pytest
import torch
from torch import nn

from halo_tensor import halo_config, hot_config
from halo_tensor.calibration.selection import CosineSelection, QuantizerSelection, gradients_under


def test_a_scale_per_token_needs_less_than_half_the_error():
    choice = QuantizerSelection(hot_config(), 0.9)
    errors = {f"energy of rank {rank}": rank / 20 for rank in choice.ranks}

    def chosen(tensor, tokens, **more):
        return choice.choose({"error with scale=tensor": tensor, "error with scale=tokens": tokens} | errors | more)

    of_e = [chosen(1.0, error).grad_output_granularity for error in (0.49, 0.5, 2.0)]
    assert of_e == ["row", "tensor", "tensor"]
    assert list(choice.ranks) == list(range(2, hot_config().block_size, 2)) and chosen(1.0, 1.0).rank is None
    errors["energy of rank 6"] = 0.9
    assert chosen(1.0, 1.0).rank == 6, "equal to the wanted energy is enough"
    errors["energy of rank 4"] = 0.95
    assert chosen(1.0, 1.0).rank == 4, "the smallest"


def test_the_first_candidate_above_the_target_is_chosen():
    configs = halo_config(1, "int8"), halo_config(0, "fp8"), halo_config(2, "int8")
    choice = CosineSelection(configs, 0.99)
    cosines = {"cosine of candidate 0": 0.98, "cosine of candidate 1": 0.99, "cosine of candidate 2": 0.999}
    assert choice.choose(cosines) is configs[1]
    assert choice.choose(cosines | {"cosine of candidate 1": 0.9899}) is configs[2]
    assert choice.choose({"cosine of candidate 0": 0.5, "cosine of candidate 2": 0.4}) is configs[0]


def test_energy_is_a_part_of_the_squared_norm():
    layer, x, e = nn.Linear(64, 64), torch.randn(64, 64), torch.randn(64, 64)
    measured = QuantizerSelection(hot_config(rounding="nearest"), 0.9).measure(layer, x, e)
    exact = gradients_under(layer, None, x, e)[2]
    for rank in (2, 8):
        actual = gradients_under(layer, hot_config(rank, rounding="nearest").recipe, x, e)[2]
        error = ((actual - exact).norm() / exact.norm()).item()
        assert 0.1 < error < 1 and measured[f"energy of rank {rank}"] == pytest.approx(1 - error**2, abs=1e-4)


def test_gradients_under_a_recipe_leave_the_layer_alone():
    layer, calls = nn.Linear(64, 64), []
    layer.register_forward_hook(lambda *_: calls.append(1))
    x, e = torch.randn(32, 64), torch.randn(32, 64)
    _, grad_x, grad_w = gradients_under(layer, None, x, e)
    assert not calls and layer.weight.grad is None and type(layer.weight) is nn.Parameter
    torch.testing.assert_close(grad_x, e @ layer.weight.detach())
    torch.testing.assert_close(grad_w, e.t() @ x)
