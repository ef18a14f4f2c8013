"""``calibrate``: HOT's quantiser and rank, HALO's level and dtype for each layer."""

import copy

import pytest
import torch
from torch import nn

from halo_tensor import Balanced, LayerConfigs, calibrate, dequantize_, halo_config, hot_config, quantize_
from tests.helpers.errors import relative_error
from tests.helpers.projections import project, rounded


class Layers(nn.Module):
    """Two layers whose gradients can be given: the loss is Σ y·e."""

    def __init__(self):
        super().__init__()
        self.even, self.outliers = nn.Linear(64, 64), nn.Linear(64, 64)
        self.conv, self.norm = nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64)

    def forward(self, x):
        image = self.norm(self.conv(x.view(2, 8, 8, 64).permute(0, 3, 1, 2)))
        return self.even(x), self.outliers(x), image


def batch(outlier: float):
    e = torch.randn(2, 64, 64)
    with_outliers = e.clone()
    with_outliers[:, ::64] *= outlier
    return torch.randn(2, 64, 64), (e, with_outliers, torch.randn(2, 64, 8, 8))


def loss(model, batch):
    return sum((y * e).sum() for y, e in zip(model(batch[0]), batch[1], strict=True))


def test_layer_wise_quantiser_selection_as_published():
    model = Layers()
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    batches = [batch(8.0)]
    torch.set_rng_state(random)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    noisy = lambda model, batch: loss(model, batch) + 0 * torch.rand(())  # noqa: E731
    chosen = calibrate(model, batches, hot_config(rounding="nearest"), loss=noisy)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items()), "BatchNorm's averages among them"
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert {name: config.grad_output_granularity for name, config in chosen.layers.items()} == {
        "even": "tensor", "outliers": "row", "conv": "tensor",
    }  # fmt: skip
    turned = project(batches[0][1][1].flatten(0, 1).t(), 16).t()
    for scale, dim in (("tensor", None), ("tokens", 1)):
        expected = relative_error(rounded(turned, 7, dim), turned)
        assert chosen.measured["outliers"][f"error with scale={scale}"] == pytest.approx(expected, rel=1e-3)


def test_configs_are_saved_loaded_and_used(tmp_path):
    model = Layers()
    chosen = calibrate(model, [batch(8.0), batch(8.0)], loss=loss)
    chosen.save(tmp_path / "layers.json")
    loaded = LayerConfigs.load(tmp_path / "layers.json")
    assert loaded == chosen and "configs of 3 layers" in str(loaded)
    report = quantize_(model, loaded)
    assert report.converted == ["even", "outliers", "conv"]
    assert model.outliers.weight.recipe == hot_config(grad_output_granularity="row").recipe
    with pytest.raises(ValueError, match="even is converted: dequantize_ first"):
        calibrate(model, [batch(1.0)], loss=loss)
    dequantize_(model)
    with pytest.raises(ValueError, match="1 layers that this model lacks, other among them"):
        quantize_(model, LayerConfigs({"other": hot_config()}))


def test_the_rank_follows_the_energy():
    """Tokens that vary slowly need few sequencies; noise needs all of them."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    slow = torch.randn(8, 64).repeat_interleave(16, 0)
    chosen = calibrate(
        model, [slow, slow], hot_config(), energy=0.95,
        loss=lambda model, x: (model[0](x) * slow).sum() + (model[1](torch.randn(128, 64)) * torch.randn(128, 64)).sum(),
    )  # fmt: skip
    assert chosen.layers["0"].rank == 2 and chosen.layers["1"].rank is None
    kept = [value for key, value in chosen.measured["1"].items() if "rank" in key]
    assert kept == sorted(kept) and kept[-1] < 0.95


def test_level_auto_chooses_the_first_faithful_candidate():
    """If no candidate is faithful, the most faithful one is chosen."""
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128))
    batches = [(torch.randn(64, 128), torch.randint(128, (64,)))]
    candidates = halo_config(0, "fp8"), halo_config(1, "int8")
    cosines = calibrate(model, batches, level="auto", target=0, candidates=candidates).measured["0"]
    assert cosines["cosine of candidate 1"] > cosines["cosine of candidate 0"] > 0.99
    for target, expected in zip((0.99, 0.9995), candidates, strict=True):
        chosen = calibrate(model, batches, level="auto", target=target, candidates=candidates)
        assert set(chosen.layers.values()) == {expected}
    assert set(calibrate(model, batches, level="auto").layers.values()) == {halo_config(1, "int8")}
    best = calibrate(model, batches, level="auto", target=1.0).layers["0"]
    assert best.dtype == "int8"
    assert len(quantize_(model, chosen).converted) == 2
    with pytest.raises(ValueError, match="level must be 'auto'"):
        calibrate(model, batches, level=1)
    with pytest.raises(TypeError, match=r"config must be a HotConfig of hot_config\(\); level='auto' chooses"):
        calibrate(model, batches, halo_config())
    with pytest.raises(ValueError, match="config and energy need level=None"):
        calibrate(model, batches, hot_config(), level="auto")
    with pytest.raises(ValueError, match="a low rank, which takes no signs"):
        calibrate(model, batches, hot_config(None, seed=0), energy=0.9)
    with pytest.raises(TypeError, match="call balance_ after quantize_"):
        calibrate(model, batches, level="auto", candidates=[Balanced(halo_config(1, "int8"))])


def test_nothing_to_measure_is_an_error():
    model = nn.Linear(64, 64)
    with pytest.raises(ValueError, match="got a gradient"):
        calibrate(model, [])
    with pytest.raises(ValueError, match="got a gradient"):
        calibrate(nn.Linear(16, 16), [torch.randn(4, 16)], loss=lambda m, x: m(x).sum())
