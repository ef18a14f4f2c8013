"""Which layers are converted, and why others are left alone."""

import copy
import logging

import pytest
import torch
from torch import nn

from halo_tensor import HaloWeight, halo_config, quantize_
from tests.helpers.tied_model import BLOCKS, Model


@pytest.mark.parametrize("tied", [True, False])
def test_the_default_filter(tied, caplog):
    model = Model(tied)
    with caplog.at_level(logging.INFO, "halo_tensor"):
        report = quantize_(model, halo_config(1, "int8"))
    assert report.converted == BLOCKS
    assert report.skipped == {
        "router": "fewer than min_features=128 features on a side",
        "head": "its weight is tied to another layer's" if tied else "it is the output embedding",
    }
    assert [n for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), HaloWeight)] == BLOCKS
    assert ("4 of 6 layers" in str(report) and "tied" in str(report)) or not tied
    assert str(report) in caplog.text
    assert (model.head.weight is model.embed.weight) == tied


class Scaled(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T / 2


class Borrowed(nn.Linear):
    """As some adapters of PEFT, whose weight is that of the layer they wrap."""

    def __init__(self, base):
        nn.Module.__init__(self)
        self.base = base
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, None

    weight = property(lambda self: self.base.weight)


def test_layers_of_another_kind_are_left_alone_and_named():
    model = nn.ModuleDict({"own": Scaled(128, 128), "wrapper": Borrowed(nn.Linear(128, 128)), "plain": nn.Linear(128, 128)})
    model.experts = nn.Parameter(torch.randn(4, 128, 256))
    model.kernel = nn.Parameter(torch.randn(128, 128, 3))
    with pytest.warns(UserWarning, match=r"(?s)only 18 % of the parameters.*experts: a stack .* \(73 % of the parameters\)"):
        report = quantize_(model, halo_config(1, "int8"))
    assert report.converted == ["wrapper.base", "plain"] and report.share == pytest.approx(2 / 11)
    assert report.skipped == {
        "own": "it is a Scaled, whose forward may be its own",
        "wrapper": "its weight is another module's",
        "experts": "a stack of matrices, as of experts, which is not called through F.linear",
    }
    with pytest.warns(UserWarning, match="only 9 %"):
        quantize_(model, halo_config(1, "int8"), filter_fn=lambda module, name: name == "own")
    with pytest.warns(UserWarning, match="runs in high precision"):
        model["own"](torch.randn(2, 128))


def test_a_layer_as_wide_as_the_vocabulary_is_no_head():
    """tests/layers/test_kinds.py has more of this."""
    model = nn.ModuleDict({"embed": nn.Embedding(512, 128), "up": nn.Linear(128, 512), "head": nn.Linear(128, 512)})
    report = quantize_(copy.deepcopy(model), halo_config(1, "int8"))
    assert report.converted == ["up"] and report.skipped == {"head": "it is the output embedding"}
    model.get_output_embeddings = lambda: model["up"]
    assert quantize_(model, halo_config(1, "int8")).converted == ["head"]


def test_skip_is_a_regular_expression():
    assert quantize_(Model(), halo_config(skip=r"blocks\.1\.|router")).converted == BLOCKS[:2]


def test_widths_that_units_cannot_address_are_left_alone():
    model = nn.ModuleList([nn.Linear(128, 136), nn.Linear(128, 128)])
    with pytest.warns(UserWarning, match=r"0: a width that is no multiple of 16 \(52 % of the parameters\)"):
        report = quantize_(model, halo_config())
    assert report.converted == ["1"] and "multiple of 16" in report.skipped["0"]


def test_attention_that_bypasses_f_linear_is_left_alone():
    model = nn.ModuleList([nn.MultiheadAttention(128, 2), nn.Linear(128, 128)])
    with pytest.warns(UserWarning, match=r"0.in_proj_weight: a matrix of a MultiheadAttention, which is no layer \(60 %"):
        report = quantize_(model, halo_config())
    assert report.converted == ["1"] and "F.linear" in report.skipped["0.out_proj"]


def test_the_output_embedding_is_the_largest_vocabulary():
    """Not any layer as wide as some table of positions."""
    model = nn.ModuleDict({"tokens": nn.Embedding(512, 128), "positions": nn.Embedding(256, 128), "up": nn.Linear(128, 256)})
    assert quantize_(model, halo_config()).converted == ["up"]
