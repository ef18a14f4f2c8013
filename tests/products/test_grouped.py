"""Rows that are multiplied with the matrix of their expert: a dense layer for each group."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halo_tensor import HaloWeight
from halo_tensor.products.experts import grouped_linear
from halo_tensor.products.linear import linear
from halo_tensor.recipe import FP6_E2M3, FP8_E4M3, INT8, halo, hot, jetfire
from tests.helpers.errors import relative_error, typical_error
from tests.helpers.expert_layers import offsets
from tests.helpers.recording import OpLog


def run(x, w, offs, e, recipe, bias=None):
    """Output and gradients of x, w and the bias."""
    given = [t.clone().requires_grad_() for t in (x, w, *([] if bias is None else [bias]))]
    y = grouped_linear(given[0], given[1], offs, *given[2:], recipe=recipe)
    return [y.detach(), *torch.autograd.grad(y, given, e)]


@given(
    sizes=st.lists(st.sampled_from([0, 1, 2, 17, 128, 129]), min_size=1, max_size=4),
    rest=st.integers(0, 3),
    widths=st.tuples(st.sampled_from([16, 48, 80, 128]), st.sampled_from([16, 64, 144])),
    level=st.integers(0, 2),
)
def test_each_expert_is_a_dense_layer(sizes, rest, widths, level):
    """Bit for bit, except for level 2, where factors are multiplied in another order. Rows of no expert are zeros."""
    torch.manual_seed(0)
    rows, recipe = sum(sizes) + rest, halo(level, INT8)
    x, w = torch.randn(rows, widths[1]), torch.randn(len(sizes), *widths)
    bias, e, offs = torch.randn(len(sizes), widths[0]), torch.randn(rows, widths[0]), offsets(sizes)
    y, grad_x, grad_w, grad_b = run(x, w, offs, e, recipe, bias)
    start = 0
    for expert, size in enumerate(sizes):
        part = slice(start, start + size)
        start += size
        if size == 0:
            assert not grad_w[expert].any() and not grad_b[expert].any()
            continue
        dense = [t.clone().requires_grad_() for t in (x[part], w[expert], bias[expert])]
        expected = linear(*dense, recipe)
        gradients = torch.autograd.grad(expected, dense, e[part])
        torch.testing.assert_close(y[part], expected, rtol=1e-6, atol=1e-6)  # the bias is added in another order
        if level < 2:
            assert torch.equal(grad_x[part], gradients[0]) and torch.equal(grad_w[expert], gradients[1])
        else:
            assert relative_error(grad_x[part], gradients[0]) < 3e-3
        torch.testing.assert_close(grad_b[expert], gradients[2])
    assert not y[start:].any() and not grad_x[start:].any()


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("format", [INT8, FP8_E4M3, FP6_E2M3], ids=str)
def test_errors_within_a_window(format, level):
    """Of each product, as a dense layer's: not more, and not less, which a silent high-precision path would have."""
    torch.manual_seed(0)
    sizes, out, width = [130, 0, 90, 300], 192, 256
    x, w, e = torch.randn(520, width), torch.randn(4, out, width), torch.randn(520, out)
    with OpLog() as log:
        actual = run(x, w, offsets(sizes), e, halo(level, format))
    codes = torch.int8 if format is INT8 else torch.float8_e4m3fn
    products = [call for call in log.calls if call[0] in ("grouped_mm", "grouped_grad")]
    assert [name for name, _ in products] == ["grouped_mm", "grouped_mm", "grouped_grad"]
    assert [dtype for name, dtype in products if name == "grouped_mm"] == [codes] * 2
    x, w, e = x.double(), w.double(), e.double()
    parts = list(zip(x.split(sizes), w, e.split(sizes), strict=True))
    exact = [
        torch.cat([a @ b.t() for a, b, _ in parts]),
        torch.cat([c @ b for _, b, c in parts]),
        torch.stack([c.t() @ a for a, _, c in parts]),
    ]
    for got, expected in zip(actual, exact, strict=True):
        assert 0.6 * typical_error(format) < relative_error(got, expected) < 1.4 * typical_error(format)


def test_an_expert_with_small_gradients_keeps_its_precision():
    """Scales of E in grad_weight exist for each (expert, out_feature): shared ones would round its codes to zero."""
    torch.manual_seed(0)
    x, w, e = torch.randn(200, 64), torch.randn(2, 32, 64), torch.randn(200, 32)
    e[100:] *= 1e-4
    _, _, grad_w = run(x, w, offsets([100, 100]), e, halo(1, INT8))
    for expert, part in enumerate((slice(0, 100), slice(100, 200))):
        assert relative_error(grad_w[expert], e[part].double().t() @ x[part].double()) < 1.4 * typical_error(INT8)


def test_a_frozen_weight_has_no_gradient_and_holds_codes():
    torch.manual_seed(0)
    x, w, e = torch.randn(40, 64, requires_grad=True), torch.randn(2, 32, 64), torch.randn(40, 32)
    offs, recipe = offsets([30, 10]), halo(1, INT8)
    frozen = HaloWeight.from_hp(w, recipe, frozen=True)
    assert frozen.master is None and frozen.turned_stack is None
    y = grouped_linear(x, frozen, offs)
    (grad,) = torch.autograd.grad(y, [x], e)
    expected = run(x.detach(), w, offs, e, recipe)
    assert torch.equal(y, expected[0]) and torch.equal(grad, expected[1])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_it_is_the_same(dynamic):
    torch.manual_seed(0)
    torch._dynamo.reset()
    weight = torch.nn.Parameter(HaloWeight.from_hp(torch.randn(3, 32, 64), halo(1, INT8)))
    compiled = torch.compile(grouped_linear, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for sizes in ([5, 0, 7], [20, 130, 3]):
        x, e = torch.randn(sum(sizes), 64), torch.randn(sum(sizes), 32)
        results = []
        for f in (grouped_linear, compiled):
            weight.grad = None
            f(x, weight, offsets(sizes)).backward(e)
            results.append(weight.grad)
        assert torch.equal(*results)


@pytest.mark.parametrize("recipe", [hot(), jetfire(), halo(1, INT8, "tensor")], ids=["hot", "jetfire", "tensor"])
def test_other_recipes_are_refused(recipe):
    with pytest.raises(ValueError, match="cannot follow this recipe: "):
        grouped_linear(torch.randn(4, 32), torch.randn(2, 16, 32), offsets([1, 3]), recipe=recipe)


@pytest.mark.parametrize(
    ("x", "w", "offs", "message"),
    [
        ((4, 48), (2, 16, 32), [1, 3], "does not fit weights of 32 in_features"),
        ((4, 32), (2, 16, 32), [1, 1, 2], "does not fit 2 experts"),
        ((4, 24), (2, 16, 24), [1, 3], "multiples of 16"),
        ((4, 32), (16, 32), [4], "three dimensions"),
    ],
)
def test_what_does_not_fit_is_an_error(x, w, offs, message):
    with pytest.raises(ValueError, match=message):
        grouped_linear(torch.randn(x), torch.randn(w), offsets(offs), recipe=halo(1, INT8))


def test_a_rotation_of_tokens_must_fit_tiles():
    from halo_tensor.recipe import Rotation, why_not_grouped

    assert "divide 128" in why_not_grouped(halo(2, INT8, rotation=Rotation(256)))
    assert why_not_grouped(halo(2, INT8, rotation=Rotation(64))) is None
