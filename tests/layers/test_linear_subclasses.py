"""Classes that inherit nn.Linear: those that compute what it computes are converted, and others are not."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from halo_tensor import dequantize_, halo_config, layer_filter, quantize_, report
from halo_tensor.layers.linear_subclasses import adds_nothing
from tests.helpers.errors import relative_error
from tests.helpers.recording import OpLog
from tests.helpers.small_models import IDS, falcon, llama

transformers = pytest.importorskip("transformers")

INT8 = halo_config(1, "int8", skip="")


class Matmul(nn.Linear):
    """As FalconLinear."""

    def forward(self, input):
        hidden_states = input @ self.weight.T
        return hidden_states if self.bias is None else hidden_states + self.bias


class Addmm(nn.Linear):
    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight.t()).view(*x.shape[:-1], self.out_features)


class Counting(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return F.linear(x.to(self.weight.dtype), weight=self.weight, bias=self.bias)


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


class Tuple(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class OtherWeight(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 1.0, self.bias)


class Dropping(nn.Linear):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training) @ self.weight.T + self.bias


class Careless(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T


class _OwnBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, e):
        return e @ ctx.saved_tensors[0], None


class OwnBackward(nn.Linear):
    def forward(self, x):
        return _OwnBackward.apply(x, self.weight)


class Remembering(Matmul):
    def forward(self, x):
        self.latest = x
        return super().forward(x)


class TwoArguments(nn.Linear):
    def forward(self, x, scale):
        return super().forward(x)


@pytest.mark.parametrize("kind", [Matmul, Addmm, Counting])
def test_classes_that_add_nothing_are_served(kind):
    layer, twin = kind(128, 256), nn.Linear(128, 256)
    twin.load_state_dict(layer.state_dict())
    model = nn.Sequential(layer)
    random = torch.get_rng_state()
    assert quantize_(model, INT8).converted == ["0"] and quantize_(twin, INT8).converted == [""]
    assert torch.equal(torch.get_rng_state(), random)
    x, e = torch.randn(2, 16, 128, requires_grad=True), torch.randn(2, 16, 256)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for either in (model, *copies, twin):
        with OpLog() as log:
            either(x).backward(e)
        assert log.products() == [torch.int8] * 3
    for either in (model, *copies):
        for a, b in zip(either.parameters(), twin.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
    assert quantize_(model, halo_config(0, "fp8")).converted == ["0"]
    assert getattr(layer, "calls", 1) == 1, "what a forward does besides is still done, and was not by the test of it"
    dequantize_(model)
    assert type(model[0]) is kind and type(layer.weight) is nn.Parameter
    assert type(copies[0][0]).__name__ == kind.__name__


@pytest.mark.parametrize("kind", [Halved, Tuple, OtherWeight, Dropping, Careless, OwnBackward, Remembering, TwoArguments])
def test_classes_that_add_something_are_not(kind):
    layer = kind(128, 128)
    assert not adds_nothing(layer) and not hasattr(layer, "latest")
    with pytest.raises(ValueError, match=f"it is a {kind.__name__}, whose forward may be its own"):
        quantize_(nn.Sequential(layer), INT8)
    assert adds_nothing(nn.Linear(16, 16)) and (kind is not Careless or adds_nothing(kind(16, 16, bias=False)))
    patched = Matmul(128, 128)
    patched.forward = lambda x: x  # as accelerate's hooks do, around a forward that is no longer the class's
    assert not adds_nothing(patched)


def test_falcon(tmp_path):
    from halo_tensor.transformers import HaloQuantConfig

    model = falcon().eval()
    model.save_pretrained(tmp_path)
    exact = model(IDS).logits
    only = {"int8": halo_config(1, "int8")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = report(model, {"input_ids": IDS, "labels": IDS}, candidates=only)
    assert found.share == 1 and found.recommended == "int8" and 0.97 < found.candidates[0].cosine < 0.99999
    assert type(model.transformer.h[0].mlp.dense_h_to_4h).__name__ == "FalconLinear"
    assert "_own_class" not in type(model.transformer.h[0].mlp.dense_h_to_4h).__dict__
    with OpLog() as log:
        assert torch.equal(model(IDS).logits, exact)
    assert log.products() == []
    assert quantize_(model, halo_config(1, "int8")).share == 1
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=HaloQuantConfig()).eval()
    for quantised in (model, loaded):
        with OpLog() as log:
            assert 1e-4 < relative_error(quantised(IDS).logits, exact) < 0.05
        assert log.products() == [torch.int8] * 8
    loaded.save_pretrained(tmp_path / "quantised")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "quantised").eval()
    assert torch.equal(again(IDS).logits, loaded(IDS).logits)


def test_the_filter_is_torchaos_too():
    accept = layer_filter(llama(), INT8)
    assert not accept(nn.Sequential(), "x") and accept(nn.Linear(128, 128), "y") and accept(Matmul(128, 128), "z")
