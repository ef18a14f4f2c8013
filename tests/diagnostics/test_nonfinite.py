import pytest
import torch
import torch.nn.functional as F
from torch import nn

from halo_tensor import HaloWeight, NonFiniteError, find_nonfinite, halo_config, quantize_


class Model(nn.Module):
    """Two branches that read one X, and a third layer."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(128)
        self.a, self.b = nn.Linear(128, 128, bias=False), nn.Linear(128, 128)
        self.act = nn.SiLU()
        self.c = nn.Linear(128, 128, bias=False)
        self.between = lambda h: h

    def forward(self, x):
        x = self.norm(x)
        return self.c(self.between(self.act(self.a(x)) * self.b(x)))


class Scaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


@pytest.fixture(params=["plain", "int8", "fp8"])
def model(request):
    model = Model()
    if request.param != "plain":
        quantize_(model, halo_config(1, request.param))
        assert isinstance(model.a.weight, HaloWeight)
    return model


def step(model, x=None, factor=1.0):
    with find_nonfinite(model) as found:
        x = torch.randn(32, 128) if x is None else x
        Scaled.apply(model(x), factor).sum().backward()
    return found


def where(found):
    first = found.first
    return first.layer, first.phase, first.product, first.operand


def hooks(model):
    """Return the hooks of every module; a converted layer has one of the library."""
    return [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]


def test_nothing_is_found_and_nothing_changes(model):
    x, before = torch.randn(32, 128, requires_grad=True), hooks(model)
    y = model(x)
    y.square().sum().backward()
    expected = [x.grad.clone(), *(p.grad.clone() for p in model.parameters())]
    x.grad = None
    model.zero_grad()
    with find_nonfinite(model) as found:
        watched = model(x)
        watched.square().sum().backward()
    assert not found and found.first is None and str(found) == "no NaN or Inf"
    assert torch.equal(watched, y)
    for actual, wanted in zip([x.grad, *(p.grad for p in model.parameters())], expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    assert hooks(model) == before
    assert not any(p._backward_hooks for p in model.parameters())


def test_inf_in_the_input(model):
    x = torch.randn(32, 128)
    x[3, 5] = torch.inf
    found = step(model, x)
    assert where(found) == ("norm", "forward", "output", "input") and not found.first.made_here
    assert (found.first.nan, found.first.inf) == (0, 1) and found.last_finite is None
    assert len(found.all) > 1 and "more that came later" in str(found)
    assert not any(finding.made_here for finding in found.all)  # results of non-finite operands are not listed


def test_made_between_two_modules(model):
    model.between = lambda h: torch.log(h - 100)
    found = step(model)
    assert where(found) == ("c", "forward", "output", "X")
    assert found.last_finite == "output of b" and "last seen finite: output of b" in str(found)
    assert found.first.nan == 32 * 128 and "arrived at output" in str(found)


def test_made_by_a_module_that_is_not_linear(model):
    model.act = nn.LogSigmoid()
    model.act.forward = torch.log
    found = step(model)
    assert where(found) == ("act", "forward", "output", None) and found.first.module == "LogSigmoid"


def test_made_by_output(model):
    with torch.no_grad():
        model.a.weight.fill_(3e38)
    found = step(model)
    assert where(found) == ("a", "forward", "output", None)
    assert "made by the product output out of finite operands" in str(found)


def test_nan_in_a_weight_and_inf_in_a_bias(model):
    with torch.no_grad():
        model.b.weight[0, 0] = torch.nan
    found = step(model)
    assert where(found) == ("b", "forward", "output", "W") and found.first.nan == 1
    assert "is a parameter" in str(found)
    with torch.no_grad():
        model.b.weight[0, 0] = 0.0
        model.b.bias[1] = torch.inf
    assert where(step(model)) == ("b", "forward", "output", "bias")


def test_inf_in_the_gradient_of_the_output(model):
    found = step(model, factor=torch.inf)
    assert where(found) == ("c", "backward", "grad_input", "E")
    assert found.last_finite == "output of c"


def test_made_by_grad_input_of_one_of_two_that_share_x(model):
    model.forward = lambda x: model.a(x) + model.b(x)
    with torch.no_grad():
        model.a.weight.fill_(1e20)
    found = step(model, torch.full((4, 128), 1e-20, requires_grad=True), factor=1e20)
    assert where(found) == ("a", "backward", "grad_input", None)


def test_made_by_grad_weight():
    model = nn.Linear(128, 128, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    with find_nonfinite(model) as found:
        Scaled.apply(model(torch.full((4, 128), 1e30)), 1e30).sum().backward()
    assert where(found) == ("", "backward", "grad_weight", None)
    assert str(found).startswith("backward, the model (Linear): 16384 Inf in grad_weight [128, 128] float32, made by")
    assert found.last_finite == "E of the model"


def test_float16_overflow_is_an_inf_made_here(model):
    with torch.no_grad():
        model.a.weight.fill_(600.0)
    model.norm.forward = lambda x: x
    found = step(model.half(), torch.ones(4, 128, dtype=torch.float16))
    assert where(found) == ("a", "forward", "output", None)
    assert (found.first.nan, found.first.inf, found.first.dtype) == (0, 4 * 128, torch.float16)


def test_stop_raises_at_the_first_and_leaves_no_hook(model):
    before = hooks(model)
    with torch.no_grad():
        model.b.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"forward, b \(Linear\): 1 NaN in W") as error, find_nonfinite(model, stop=True):
        model(torch.randn(4, 128))
    assert error.value.finding.layer == "b" and isinstance(error.value, ArithmeticError)
    assert hooks(model) == before


def test_stop_raises_from_a_backward(model):
    with pytest.raises(NonFiniteError, match="backward, c"), find_nonfinite(model, stop=True):
        Scaled.apply(model(torch.randn(4, 128)), torch.nan).sum().backward()


def test_a_backward_after_the_block_is_not_watched(model):
    with find_nonfinite(model) as found:
        y = Scaled.apply(model(torch.randn(4, 128)), torch.nan)
    y.sum().backward()
    assert not found and model.c.weight.grad.isnan().all()


def test_without_gradients_and_with_checkpointing(model):
    x = torch.randn(4, 128)
    with torch.no_grad(), find_nonfinite(model) as found:
        assert torch.equal(model(x), model(x))
    assert not found
    with find_nonfinite(model) as found:
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
        Scaled.apply(y, torch.nan).sum().backward()
    assert where(found) == ("c", "backward", "grad_input", "E")


def test_a_parametrized_linear_is_watched():
    model = torch.nn.utils.parametrizations.weight_norm(nn.Linear(128, 128))
    with find_nonfinite(model) as found:
        model(torch.full((2, 128), 3e38))
    assert where(found) == ("", "forward", "output", None)


def test_an_embedding_takes_integers():
    model = nn.Sequential(nn.Embedding(10, 128), nn.Linear(128, 128))
    with find_nonfinite(model) as found:
        F.mse_loss(model(torch.randint(0, 10, (4, 7))), torch.zeros(4, 7, 128)).backward()
    assert not found
    with torch.no_grad():
        model[0].weight[:] = torch.nan
    with find_nonfinite(model) as found:
        model(torch.randint(0, 10, (4, 7)))
    assert where(found) == ("0", "forward", "output", "W")
