"""The arithmetic behind modelled and measured figures, against sums done by hand: roofline, measure, calibrate, balance."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from halo_tensor import halo_config, hot_config
from halo_tensor.analysis import cost as analysis
from halo_tensor.analysis import measure, roofline
from halo_tensor.calibration.balance import Statistics, _exponents, _groups, observed
from halo_tensor.calibration.choice import _Cosines, _Quantisers, gradients_under
from halo_tensor.recipe import RECIPES, Recipe

CEILINGS = roofline.Ceilings(
    "a GPU",
    {"bf16": 100.0, "int8": 200.0, "fp8": 250.0},
    {"bf16": 1.0, "int8": 0.5, "fp8": 0.8},
    40.0,
    5.0,
    4.0,
    2.0,
    "by hand",
)
T, I, O = 64, 32, 16
SIZES = {"tokens": T, "in_features": I, "out_features": O}
OPERATIONS = 2 * T * I * O


def seconds(recipe, *products, ceilings=CEILINGS, **options):
    return roofline.seconds(recipe, SIZES, products or ("output", "grad_input", "grad_weight"), ceilings=ceilings, **options)


def test_time_in_high_precision():
    assert seconds(Recipe()) == pytest.approx(3 * OPERATIONS / 100)
    memory = [2 * (T * I + I * O + T * O) / 10] * 3  # of every product: both operands are read, the result is written
    slow = roofline.Ceilings("", {"bf16": 1e9}, {"bf16": 1.0}, 10.0, 1.0, 1.0, 1.0, "")
    assert seconds(Recipe(), ceilings=slow) == pytest.approx(sum(memory)), "bound by memory"
    assert seconds(Recipe(), "output", ceilings=slow) == pytest.approx(memory[0])


def test_time_in_eight_bits():
    """HALO-1 in int8: X and W are rotated along in_features, so grad_input and grad_weight undo one rotation each."""
    recipe = halo_config(1, "int8").recipe
    products = OPERATIONS / 200 + 2 * OPERATIONS / (200 * 0.5)
    x, w = (n * (2 + 2) / 4 for n in (T * I, I * O))  # read in bf16, written in two layouts, rotated
    e = {}  # how E enters each of its products
    for name in ("grad_input", "grad_weight"):
        e.setdefault(recipe.operand(name, ("tokens", "out_features")), []).append(name)
    e = sum(T * O * (2 + len(names)) / 5 for names in e.values())
    assert seconds(recipe) == pytest.approx(products + x + w + e)
    assert seconds(recipe, sharing=4) == pytest.approx(products + x / 4 + w + e)
    frozen = seconds(recipe, trained=False)  # one layout exists; the other is a copy of codes: read and written
    assert frozen == pytest.approx(products + x + e + 2 * I * O / 40)
    forward = seconds(recipe, "output")
    assert forward == pytest.approx(OPERATIONS / 200 + (T * I + I * O) * (2 + 1) / 4)
    fp8 = halo_config(0, "fp8").recipe
    assert seconds(fp8, "output") == pytest.approx(OPERATIONS / 250 + (T * I + I * O) * 3 / 5), "not rotated"
    for block, rate in ((256, 4), (512, 2), (None, 2)):
        wide = halo_config(1, "int8", block_size=block).recipe
        assert seconds(wide, "output") == pytest.approx(OPERATIONS / 200 + (T * I + I * O) * 3 / rate)


def test_blocks_are_multiplied_in_high_precision():
    """There is no kernel for their scales: the reads are of bf16 too."""
    slow = roofline.Ceilings("", {"bf16": 100.0}, {"bf16": 1.0}, 10.0, 1e9, 1e9, 1e9, "")
    expected = max(OPERATIONS / 100, 2 * (T * I + I * O + T * O) / 10)
    assert seconds(RECIPES["jetfire"], "output", ceilings=slow) == pytest.approx(expected, rel=1e-4)


def test_rows_are_evenly_spaced():
    assert measure._evenly(10, 4, torch.device("cpu")).tolist() == [0, 2, 5, 7]
    assert measure._evenly(3, 4, torch.device("cpu")).tolist() == [0, 1, 2] and not len(
        measure._evenly(0, 4, torch.device("cpu"))
    )


def test_sampled_gradients_have_the_norm_of_the_whole(monkeypatch):
    monkeypatch.setattr(measure, "GRADIENT_SAMPLE", 64)
    weight, small = nn.Parameter(torch.ones(16, 64)), nn.Parameter(torch.ones(64))
    found = measure.gradients((weight * 3).sum() + (small * torch.arange(64.0)).sum(), {"w": weight, "s": small})
    assert len(found["w"]) == 64 and found["w"].square().sum().item() == pytest.approx(9 * 16 * 64)
    assert found["s"].tolist() == list(range(64)), "as many as are sampled: all, in order"


def test_lqs_wants_less_than_half_the_error():
    choice = _Quantisers(hot_config(), 0.9)
    errors = {f"energy of rank {rank}": rank / 20 for rank in choice.ranks}

    def chosen(tensor, tokens, **more):
        return choice.choose({"error with scale=tensor": tensor, "error with scale=tokens": tokens} | errors | more)

    assert chosen(1.0, 0.49).scale == "tokens" and chosen(1.0, 0.5).scale == "tensor" and chosen(1.0, 2.0).scale == "tensor"
    assert list(choice.ranks) == list(range(2, hot_config().block_size, 2)) and chosen(1.0, 1.0).rank is None
    errors["energy of rank 6"] = 0.9
    assert chosen(1.0, 1.0).rank == 6, "exactly what is wanted is enough"
    errors["energy of rank 4"] = 0.95
    assert chosen(1.0, 1.0).rank == 4, "the smallest"


def test_auto_takes_the_first_that_is_good_enough():
    configs = halo_config(1, "int8"), halo_config(0, "fp8"), halo_config(2, "int8")
    choice = _Cosines(configs, 0.99)
    cosines = {"cosine of candidate 0": 0.98, "cosine of candidate 1": 0.99, "cosine of candidate 2": 0.999}
    assert choice.choose(cosines) is configs[1]
    assert choice.choose(cosines | {"cosine of candidate 1": 0.9899}) is configs[2]
    assert choice.choose({"cosine of candidate 0": 0.5, "cosine of candidate 2": 0.4}) is configs[0]


def test_statistics_of_balance_are_means_over_rows():
    """Of several calls, and of layers that share an s, all rows count the same."""
    a, b, c = (nn.Linear(4, 2, bias=False) for _ in range(3))
    x, y = torch.randn(8, 4), 3 * torch.randn(2, 4)
    layers = {"a": a, "b": b, "c": c}
    with observed(layers) as statistics:
        a(x), b(x), c(y), c(x + 0)
    assert statistics.rows == {"a": 8, "b": 8, "c": 10}
    torch.testing.assert_close(statistics.squares["c"], x.square().sum(0) + y.square().sum(0))
    with observed(layers) as changed:
        a(z := x.clone()), b(z.mul_(2))
    torch.testing.assert_close(changed.squares["b"], 4 * changed.squares["a"])  # written to in between: another X
    weights = {name: layer.weight for name, layer in layers.items()}
    assert sorted(map(sorted, _groups(weights, statistics))) == [["a", "b"], ["c"]]

    made = Statistics()
    power = torch.tensor([2.0**8, 1.0, 1.0, 2.0**-8])
    made.squares, made.rows = {"a": 6 * power, "b": 2 * power}, {"a": 6, "b": 2}
    single = Statistics()
    single.squares, single.rows = {"a": power}, {"a": 1}
    two = _exponents(["a", "b"], weights, made)
    weights["b"] = weights["a"]
    assert torch.equal(_exponents(["a", "b"], weights, made), _exponents(["a"], weights, single))
    assert two[0] > two[1] >= two[3] and two.abs().max() <= 8
    power[1] = 0
    assert _exponents(["a"], weights, single)[1] == 0, "a column of zeros is left alone"


def test_bit_operations_by_hand():
    """HALO-1 in int8: blocks of 128 take 7 additions an element, of 16 bits; a scaling takes 16·16."""
    recipe, groups = halo_config(1, "int8").recipe, 3
    tokens, n_in, n_out = 256, 128, 64
    shape = analysis.Shape(tokens, n_in, n_out, groups, (tokens, n_in))
    counts = analysis.bit_operations(recipe, shape)
    of_e = {recipe.operand(name, ("tokens", "out_features")) for name in ("grad_input", "grad_weight")}
    made = (tokens * n_in + n_in * n_out) * (7 * 16 + 16 * 16) + len(of_e) * tokens * n_out * 16 * 16  # X and W once each
    undone = 7 * 16 * (tokens * n_in + n_out * n_in)
    assert counts["transforms"] == groups * (made + undone)
    assert counts["output"] == counts["grad_input"] == groups * tokens * n_in * n_out * 64


def test_shapes_of_layers_at_work():
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.o = (nn.Linear(64, 32) for _ in range(3))
            self.conv, self.pointwise = nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.Conv2d(16, 32, 1, stride=2)

        def forward(self, x, image):
            return self.q(x), self.k(x), self.o(x + 1), self.conv(image), self.pointwise(image)

    found = analysis.shapes(Layers(), torch.randn(2, 5, 64), torch.randn(2, 16, 8, 8))
    linear = analysis.Shape(10, 64, 32, 1, (10, 64))
    assert (found["q"], found["k"], found["o"]) == (linear, replace(linear, first=False), linear), "k reads what q has saved"
    assert found["conv"] == analysis.Shape(32, 144, 32, 1, (128, 16)), "input positions, not windows"
    assert found["pointwise"] == analysis.Shape(32, 16, 32, 1, (32, 16)), "only the positions that it reads"


def test_energy_is_of_squares():
    layer, x, e = nn.Linear(64, 64), torch.randn(64, 64), torch.randn(64, 64)
    measured = _Quantisers(hot_config(rounding="nearest"), 0.9).measure(layer, x, e)
    exact = gradients_under(layer, None, x, e)[2]
    for rank in (2, 8):
        actual = gradients_under(layer, hot_config(rank, rounding="nearest").recipe, x, e)[2]
        error = ((actual - exact).norm() / exact.norm()).item()
        assert 0.1 < error < 1 and measured[f"energy of rank {rank}"] == pytest.approx(1 - error**2, abs=1e-4)
