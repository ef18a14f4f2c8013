"""The three products of a converted linear layer, against float64."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from halo_tensor import halo_config, quantize_, recipe_config
from halo_tensor.products import operands
from halo_tensor.products.operands import _thread, shared_operands
from halo_tensor.recipe import FORMATS, INT8, Operand, Product, Recipe, Rotation, Scales
from tests.helpers.errors import relative_error, typical_error
from tests.helpers.linear_layers import converted, exact, gradients, rotation_matrix
from tests.helpers.recording import OpLog, saved_bytes

LEVELS, DTYPES, GRANULARITIES = (0, 1, 2), ("int8", "fp8", "fp6_e2m3", "fp6_e3m2"), ("row", "tensor")
CODES = {"int8": torch.int8}  # else float8_e4m3fn


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_gradients_within_a_window(level, dtype, granularity):
    """Y, E_X and G have the error of their format: not more, and not less, which a silent high-precision path would have."""
    plain = nn.Linear(192, 320)
    layer = converted(plain, halo_config(level, dtype, granularity=granularity))
    x, e = torch.randn(2, 75, 192), torch.randn(2, 75, 320)
    with OpLog() as log:
        actual = gradients(layer, x, e)
    assert log.products() == [CODES.get(dtype, torch.float8_e4m3fn)] * 3
    names = ("output", "grad_input", "grad_weight", "grad_bias")
    for name, a, b in zip(names, actual, exact(plain, x, e), strict=True):
        error = relative_error(a.reshape(b.shape), b)
        if name == "grad_bias":
            assert error < 1e-6
            continue
        typical = typical_error(halo_config(level, dtype).recipe.formats[0])
        if dtype == "int8" and granularity == "tensor":
            typical *= 1.35
        assert 0.6 * typical < error < 1.4 * typical, name


def rounded(x: torch.Tensor, dim: int | None) -> torch.Tensor:
    """int8 round trip in float64 with one scale per index of the dimension that is not ``dim``, or one for all."""
    amax = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = amax / 127
    return (x / scale).round() * scale


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("level", LEVELS)
def test_halo_int8_is_what_its_formulas_say(level, granularity):
    """An independent float64 derivation with dense rotation matrices (DESIGN's formulas, tokens a multiple of the block)."""
    m, k, n = 128, 192, 256
    plain = nn.Linear(k, n, bias=False)
    x, e, w = torch.randn(m, k), torch.randn(m, n), plain.weight.detach().double()
    x[:, 3] *= 20
    actual = gradients(converted(plain, halo_config(level, "int8", granularity=granularity)), x, e)

    h_k = rotation_matrix(Rotation(64) if level else None, k)
    h_m = rotation_matrix(Rotation(128) if level == 2 else None, m)
    x, e = x.double() @ h_k, e.double()
    w = w @ h_k
    if granularity == "tensor":
        x_q, w_q = rounded(x, None), rounded(w, None)
        grad_input = h_m @ rounded(h_m.t() @ e, None) @ w_q @ h_k.t()
        grad_weight = rounded(e, None).t() @ x_q @ h_k.t()
    else:
        s_x, s_w = x.abs().amax(1) / 127, w.abs().amax(1) / 127
        x_codes, w_codes = (x / s_x[:, None]).round(), (w / s_w[:, None]).round()
        x_q, w_q = x_codes * s_x[:, None], w_codes * s_w[:, None]
        grad_input = h_m @ rounded((h_m.t() @ e) * s_w, 1) @ w_codes @ h_k.t()
        grad_weight = rounded(e * s_x[:, None], 0).t() @ x_codes @ h_k.t()
    for a, b in zip(actual, (x_q @ w_q.t(), grad_input, grad_weight), strict=True):
        # float32 and float64 round a few ties differently; a different formula would be off by 1e-2.
        assert relative_error(a, b) < 1e-3


@pytest.mark.parametrize("name", ["switchback", "jetfire"])
def test_named_recipes(name):
    plain = nn.Linear(192, 320)
    layer = converted(plain, recipe_config(name))
    x, e = torch.randn(150, 192), torch.randn(150, 320)
    with OpLog() as log:
        actual = gradients(layer, x, e)
    assert len(log.products()) == (2 if name == "switchback" else 3)
    for i, (a, b) in enumerate(zip(actual, exact(plain, x, e), strict=True)):
        upper = 1e-5 if i == 3 or (name == "switchback" and i == 2) else 0.016
        assert upper / 5 * (upper > 1e-4) <= relative_error(a, b) < upper


def test_ideal_is_a_bare_cast():
    plain = nn.Linear(128, 128, bias=False)
    layer = converted(plain, recipe_config("ideal_fp8"))
    x = torch.randn(32, 128)
    expected = x.to(torch.float8_e4m3fn).float() @ plain.weight.to(torch.float8_e4m3fn).float().t()
    torch.testing.assert_close(layer(x), expected)


def test_a_recipe_of_ones_own():
    """numerics.md's next step: tokens rotated in grad_weight, out_features in grad_input. Only data; nothing else changes."""
    r = Rotation()
    x, w = (
        Operand(INT8, Scales.per(tokens=1), tokens=r, in_features=r),
        Operand(INT8, Scales.per(out_features=1), in_features=r),
    )
    recipe = Recipe(
        output=Product(x, w),
        grad_input=Product(
            Operand(INT8, Scales.per(tokens=1), out_features=r),
            Operand(INT8, Scales.per(in_features=1), in_features=r, out_features=r),
        ),
        grad_weight=Product(Operand(INT8, Scales.per(out_features=1), tokens=r), x),
    )
    plain = nn.Linear(192, 320)
    x, e = torch.randn(256, 192), torch.randn(256, 320)
    for a, b in zip(gradients(converted(plain, recipe), x, e), exact(plain, x, e), strict=True):
        assert relative_error(a, b) < 0.014


@given(
    lead=st.sampled_from([(), (1,), (7,), (2, 5), (2, 3, 4), (0,), (3, 0)]),
    k=st.sampled_from([1, 7, 48, 136, 576]),
    n=st.sampled_from([1, 5, 64, 100]),
    level=st.sampled_from(LEVELS),
    dtype=st.sampled_from(DTYPES),
    granularity=st.sampled_from(GRANULARITIES),
    hp=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bias=st.booleans(),
    transposed=st.booleans(),
)
def test_any_shape_and_layout(lead, k, n, level, dtype, granularity, hp, bias, transposed):
    plain = nn.Linear(k, n, bias=bias).to(hp)
    layer = converted(plain, halo_config(level, dtype, granularity=granularity))
    x, e = torch.randn(*lead, k).to(hp), torch.randn(*lead, n).to(hp)
    if transposed:
        x, e = x.t().contiguous().t() if x.ndim == 2 else x, e.new_full((), 0.5).expand_as(e)
    actual = gradients(layer, x, e)
    for a, b in zip(actual, exact(plain, x, e), strict=True):
        assert a.dtype == hp and a.isfinite().all()
        if b.numel() and b.norm() > 0.1 * b.numel() ** 0.5:
            assert relative_error(a.reshape(b.shape), b) < 0.35
        elif 0 in lead:
            assert (a == 0).all()
    assert actual[0].shape == (*lead, n) and actual[1].shape == x.shape


@pytest.mark.parametrize("wide", [4864, 14336, 18944])
def test_widths_of_real_models(wide):
    plain = nn.Linear(wide, 32, bias=False)
    x, e = torch.randn(33, wide), torch.randn(33, 32)
    for block_size in (128, None):
        layer = converted(plain, halo_config(1, "int8", block_size=block_size))
        for a, b in zip(gradients(layer, x, e), exact(plain, x, e), strict=True):
            assert 0.004 < relative_error(a, b) < 0.016


@pytest.mark.parametrize("frozen", ["weight", "input", "both"])
def test_only_the_gradients_that_are_needed(frozen):
    plain = nn.Linear(128, 128)
    layer = converted(plain, halo_config(1, "int8"))
    x = torch.randn(16, 128, requires_grad=frozen == "weight")
    layer.weight.requires_grad_(frozen == "input")
    with OpLog() as log, saved_bytes() as saved:
        layer(x).sum().backward()
    assert len(log.products()) == (1 if frozen == "both" else 2)
    assert (x.grad is not None) == (frozen == "weight")
    assert (layer.weight.grad is not None) == (frozen == "input")
    assert layer.bias.grad is not None
    assert (saved(layer) > 0) == (frozen == "input"), "a frozen weight saves no activations"


@pytest.mark.parametrize("recipe", ["row", "tensor"])
def test_saved_activations_are_eight_bit_and_shared(recipe):
    """Three layers that read one X save it once, as codes."""
    layers = nn.ModuleList(nn.Linear(256, 128) for _ in range(3))
    x = torch.randn(64, 256, requires_grad=True) + 0  # what a layer before them would give; of leaves nothing is shared
    with saved_bytes() as saved:
        out = [layer(x) for layer in layers]
    plain = saved(layers)
    del out
    quantize_(layers, halo_config(1, "int8", granularity=recipe))
    with saved_bytes() as saved:
        out = [layer(x) for layer in layers]
    assert plain == 64 * 256 * 4
    assert saved(layers) == 64 * 256 + (64 * 4 if recipe == "row" else 4)
    assert len(out) == 3


def test_what_is_shared_is_not_stale():
    layer = converted(nn.Linear(128, 128, bias=False), halo_config(1, "int8"))
    x = torch.randn(16, 128, requires_grad=True) + 0
    first = layer(x)
    assert torch.equal(layer(x), first) and shared_operands(x)
    x.mul_(2)
    torch.testing.assert_close(layer(x), 2 * first)
    with torch.no_grad():
        layer.weight.mul_(2)
    torch.testing.assert_close(layer(x), 4 * first)
    layer.weight.data.mul_(2)
    torch.testing.assert_close(layer(x), 8 * first)
    layer.weight.data = layer.weight.data * 2
    torch.testing.assert_close(layer(x), 16 * first)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x.clone()), 16 * first)


@pytest.mark.parametrize("write", ["data", "numpy", "set_data"])
def test_inputs_written_without_a_trace(write):
    """As receiving ranks, data loaders and graphs write to the buffers that a first layer reads: versions do not tell."""
    layer = converted(nn.Linear(128, 128, bias=False), halo_config(1, "int8"))
    array = torch.randn(16, 128).numpy()
    x = torch.from_numpy(array)
    first = layer(x).detach()
    if write == "data":
        x.data.mul_(2)
    elif write == "numpy":
        array *= 2
    else:
        x.data = x * 2
    torch.testing.assert_close(layer(x), 2 * first)


@pytest.mark.parametrize("size", [1, 100, 300])
def test_a_bias_of_another_size(size):
    layer, x = nn.Linear(128, 256), torch.randn(16, 128)
    layer.bias = nn.Parameter(torch.randn(size))
    if size > 1:
        layer = converted(layer, halo_config(1, "int8"))
        with pytest.raises(ValueError, match=rf"a bias of shape \[{size}\] does not fit"):
            layer(x)
        return
    expected = layer(x)
    layer = converted(layer, halo_config(1, "int8"))
    layer(x).sum().backward()
    assert 1e-4 < relative_error(layer(x), expected) < 0.05
    torch.testing.assert_close(layer.bias.grad, torch.tensor([16.0 * 256]))


@pytest.mark.parametrize("config", [halo_config(1, "int8"), halo_config(0, "fp8"), recipe_config("hot_llm")], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_results_can_be_written_to(config, compiled):
    """By ReLU(inplace=True), or a residual that is added in place."""
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(inplace=True), nn.Linear(128, 128))
    x, other = torch.randn(4, 8, 128), copy.deepcopy(model)
    other[1] = nn.ReLU()
    for m in (model, other):
        quantize_(m, config)
    written = torch.compile(lambda x: model(x).add_(x), backend="aot_eager", fullgraph=True) if compiled else model(x).add_
    written(x).sum().backward()
    (other(x) + x).sum().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_more_tokens_than_an_integer_holds_products_of():
    """127² · 140000 > 2³¹."""
    layer = converted(nn.Linear(16, 16, bias=False), halo_config(0, "int8"))
    x = torch.ones(140000, 16)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.full((16, 16), 140000.0), rtol=1e-5, atol=0)


def test_devices():
    layer = converted(nn.Linear(128, 256), halo_config(1, "int8"))
    with pytest.raises(ValueError, match="the input is on meta and the layer on cpu"):
        layer(torch.ones(16, 128, device="meta"))
    assert layer.to("meta")(torch.ones(16, 128, device="meta")).shape == (16, 256)


def test_codes_of_one_matrix_are_kept():
    """Checkpointing keeps the X of every block; their codes would double that."""
    layer = converted(nn.Linear(128, 128, bias=False), halo_config(1, "int8"))
    kept = [torch.randn(16, 128, requires_grad=True) + i for i in range(3)]
    for x in kept:
        layer(x)
    assert _thread.shared.owner() is kept[-1] and _thread.shared.operands
    del x, kept
    assert _thread.shared.owner() is None and not _thread.shared.operands


def test_a_cuda_graph_captures_its_own_quantisation(monkeypatch):
    """Not the codes of a warm-up, which a replay would never renew."""
    layer = converted(nn.Linear(128, 128), halo_config(1, "int8"))
    x = torch.randn(16, 128, requires_grad=True) + 0
    layer(x)
    monkeypatch.setattr(operands, "_is_captured", lambda x: True)
    assert shared_operands(x) == {}
    monkeypatch.undo()
    assert shared_operands(x)


def test_a_weight_written_between_forward_and_backward_is_an_error():
    """As for a plain nn.Linear."""
    layer = converted(nn.Linear(128, 128), halo_config(1, "int8"))
    y = layer(torch.randn(4, 128, requires_grad=True))
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
def test_autocast(master):
    plain = nn.Linear(128, 192).to(master)
    layer = converted(plain, halo_config(1, "int8"))
    x = torch.randn(64, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), OpLog() as log:
        y = layer(x)
        assert y.dtype == plain(x).dtype == torch.bfloat16
    e = torch.randn_like(y)
    grad_x, grad_w = torch.autograd.grad(y, (x, layer.weight), e)
    assert log.products() == [torch.int8]
    assert grad_x.dtype == torch.float32 and grad_w.dtype == master
    expected = exact(plain, x.detach(), e)
    for a, b in zip((y, grad_x, grad_w), expected, strict=False):
        assert 0.004 < relative_error(a, b) < 0.016


def test_no_grad_saves_nothing_and_agrees():
    layer = converted(nn.Linear(128, 128), halo_config(1, "int8"))
    x = torch.randn(16, 128)
    expected = layer(x)
    with torch.no_grad(), saved_bytes() as saved:
        y = layer(x)
    assert saved(layer) == 0 and not y.requires_grad
    assert torch.equal(y, expected)


def test_nan_and_inf_reach_every_gradient():
    layer = converted(nn.Linear(128, 128), halo_config(2, "int8"))
    for bad in (float("nan"), float("inf")):
        x, e = torch.randn(130, 128), torch.randn(130, 128)
        x[3, 5] = bad
        y, _, grad_w, _ = gradients(layer, x, e)
        assert not y[3].isfinite().any() and y[:3].isfinite().all()
        assert not grad_w.isfinite().any()
        x[3, 5], e[4, 6] = 0, bad
        _, grad_x, grad_w, grad_bias = gradients(layer, x, e)
        assert not grad_x[4].isfinite().any() and not grad_w[6].isfinite().any() and not grad_bias[6].isfinite()


def test_bad_input_gets_one_clear_error():
    layer = converted(nn.Linear(128, 64), halo_config(1, "int8"))
    with pytest.raises(ValueError, match=r"shape \[4, 100\] does not fit a weight of \[64, 128\]"):
        layer(torch.randn(4, 100))
    with pytest.raises(ValueError, match=r"input torch.bfloat16, weight torch.float32 .* must be of one dtype"):
        layer(torch.randn(4, 128).bfloat16())
    x = torch.randn(4, 128, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


def test_every_format_has_a_typical_error():
    """The windows above rest on it: measured here on the plain product of two Gaussian matrices."""
    from halo_tensor import HadamardQuantTensor

    x, w = torch.randn(256, 512), torch.randn(256, 512)
    for format in FORMATS.values():
        y = torch.mm(HadamardQuantTensor.from_hp(x, format), HadamardQuantTensor.from_hp(w, format).t())
        assert 0.75 < relative_error(y, x.double() @ w.double().t()) / typical_error(format) < 1.3, format


def test_autocast_does_not_reach_the_rotations():
    """Neither of a weight that is quantised inside it, nor of a backward pass that is run inside it."""
    x, e = torch.randn(32, 128, requires_grad=True), torch.randn(32, 128)
    layer = nn.Linear(128, 128, bias=False)

    def gradient(*, inside: bool):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            quantize_(layer, halo_config(1, "int8"))
            with torch.autocast("cpu", enabled=False):
                y = layer(x)
            return layer.weight.operand.codes, *torch.autograd.grad(y, [x, layer.weight], e)

    for a, b in zip(gradient(inside=True), gradient(inside=False), strict=True):
        assert torch.equal(a, b)
