"""``F.grouped_mm`` with converted weights of experts."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from halo_tensor import HaloWeight
from halo_tensor.products.experts import grouped_linear
from halo_tensor.recipe import INT8, halo
from tests.helpers.errors import relative_error
from tests.helpers.expert_layers import offsets
from tests.helpers.recording import OpLog

OFFS = offsets([20, 0, 17, 5])


def operands(in_features_first=False, dtype=torch.float32):
    torch.manual_seed(0)
    x, w, e = torch.randn(45, 64, dtype=dtype), torch.randn(4, 48, 64, dtype=dtype) / 8, torch.randn(45, 48, dtype=dtype)
    w = w.transpose(1, 2).contiguous() if in_features_first else w
    return x, w, e


def product(f, x, w, e, transposed=True):
    x, w = x.clone().requires_grad_(), w if w.requires_grad else w.clone().requires_grad_()
    y = f(x, w.transpose(-2, -1) if transposed else w, OFFS)
    return [y[:42], *(g[:42] if g.ndim == 2 else g for g in torch.autograd.grad(y, [x, w], e))]


def grouped_mm(x, w, offs):
    return F.grouped_mm(x, w, offs=offs)


@pytest.mark.parametrize("in_features_first", [False, True])
@pytest.mark.parametrize("f", [grouped_mm, torch._grouped_mm], ids=["F", "torch"])
def test_the_quantised_product_runs(f, in_features_first):
    x, w, e = operands(in_features_first)
    parameter = nn.Parameter(HaloWeight.from_hp(w, halo(1, INT8), in_features_first=in_features_first))
    with OpLog() as log, warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = product(f, x, parameter, e, transposed=not in_features_first)
    assert [name for name, _ in log.calls].count("grouped_mm") == 2
    e[42:] = 0
    for a, b in zip(actual, product(f, x, w, e, transposed=not in_features_first), strict=True):
        assert 0.005 < relative_error(a, b) < 0.02
    with torch.no_grad():
        parameter.mul_(2)
        y = f(x, parameter if in_features_first else parameter.mT, OFFS)
    assert torch.equal(y[:42], 2 * actual[0]) and not y.requires_grad


def test_compiled_code_gives_the_same():
    x, w, e = operands()
    parameter = nn.Parameter(HaloWeight.from_hp(w, halo(1, INT8)))

    def layer(x, w, offs):
        return grouped_mm(x, w.transpose(-2, -1), offs)

    expected = product(layer, x, parameter, e, transposed=False)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for a, b in zip(product(compiled, x, parameter, e, transposed=False), expected, strict=True):
        assert relative_error(a, b) < 1e-6
    assert torch.equal(expected[0], grouped_linear(x, parameter, OFFS)[:42])


def test_a_cast_weight_as_in_torchtitan():
    """It is cast in forward, and its gradient reaches the parameter."""
    x, w, e = operands()
    parameter = nn.Parameter(HaloWeight.from_hp(w, halo(1, INT8)))
    with OpLog() as log:
        y = F.grouped_mm(x.bfloat16(), parameter.bfloat16().transpose(-2, -1), offs=OFFS)
        y.backward(e.bfloat16())
    assert "grouped_mm" in [name for name, _ in log.calls] and y.dtype == torch.bfloat16
    assert parameter.grad.dtype == torch.float32 and not parameter.grad[1].any()
    expected = product(grouped_mm, x, w, torch.cat([e[:42], 0 * e[42:]]))
    assert 0.005 < relative_error(y[:42], expected[0]) < 0.03 and 0.005 < relative_error(parameter.grad, expected[2]) < 0.03


def test_another_view_or_shape_runs_in_high_precision_with_a_warning():
    x, w, _ = operands()
    weight = HaloWeight.from_hp(w, halo(1, INT8))
    with pytest.warns(UserWarning, match="runs in high precision"):
        y = F.grouped_mm(x[:, :48], weight, offs=OFFS)  # [experts, out, in] as if it were [experts, in, out]
    torch.testing.assert_close(y[:42], F.grouped_mm(x[:, :48], w, offs=OFFS)[:42])
    with pytest.warns(UserWarning, match="runs in high precision"):
        y = F.grouped_mm(x, weight[1:].transpose(1, 2), offs=OFFS[1:])
    torch.testing.assert_close(y[:42], F.grouped_mm(x, w[1:].transpose(1, 2), offs=OFFS[1:])[:42])
