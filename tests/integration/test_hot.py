"""HOT: the backward products against their float64 definitions, what is saved, and what it trains."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from halo_tensor import dequantize_, hot_config, ops, quantize_, recipe_config
from halo_tensor.analysis import Shape, bit_operations, measure_saved, shapes
from halo_tensor.analysis import cost as analysis
from halo_tensor.recipe import FORMATS, FP4_E3M0, INT4, INT8, RECIPES, Operand, Product, Recipe, Rotation, Scales
from halo_tensor.reference import ops as reference
from halo_tensor.reference.codes import round_to
from halo_tensor.reference.hadamard import hadamard, sequency_order
from tests.helpers.errors import relative_error
from tests.helpers.linear_layers import converted, exact, gradients
from tests.helpers.projections import project, rounded
from tests.helpers.recording import OpLog, saved_bytes

blocks = st.sampled_from([2, 4, 8, 16, 64, 256])


@given(block=blocks)
def test_sequency_order(block):
    h = hadamard(block)[:, sequency_order(block)]
    assert (h[1:] != h[:-1]).sum(0).tolist() == list(range(block))


@given(block=blocks, rank=st.integers(1, 256), m=st.integers(0, 300), n=st.sampled_from([0, 1, 5, 32]), side=st.booleans())
def test_a_rank_is_a_projection(block, rank, m, n, side):
    """rotate gives the coefficients of the lowest sequencies; unrotate its transpose: twice there and back is once."""
    rank = min(rank, block)
    r, x = Rotation(block, None, rank), torch.randn(m, n)
    left, right = (r, None) if side else (None, r)
    there = ops.rotate(x if side else x.t(), left, right)
    assert there.shape == ((reference.rotated(m, r), n) if side else (n, reference.rotated(m, r)))
    torch.testing.assert_close((there if side else there.t()).double(), project(x, block, rank), atol=1e-5, rtol=1e-5)
    back = ops.unrotate(there, left, right, (m, n) if side else (n, m))
    if m % block == 0:
        torch.testing.assert_close(ops.rotate(back, left, right), there, atol=1e-5, rtol=1e-5)
    if rank == block:
        torch.testing.assert_close(back, x if side else x.t(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("of_e", ["tensor", "row"])
@pytest.mark.parametrize(("rank", "saved_bits"), [(8, None), (3, None), (None, None), (None, 4), (5, 4)])
def test_hot_is_what_its_formulas_say(rank, saved_bits, of_e, granularity):
    """With rounding to nearest, to be comparable: hot.md's two paths, 197 tokens padded to 208. X in 4 bits has scales of its
    own."""
    plain = nn.Linear(128, 192)
    x, e = torch.randn(197, 128), torch.randn(197, 192)
    options = {"grad_output_granularity": of_e, "granularity": granularity, "saved_bits": saved_bits}
    config = hot_config(rank, **options, rounding="nearest")
    layer = converted(plain, config)
    y, grad_x, grad_w, grad_bias = gradients(layer, x, e)

    e_turned = project(e.t(), 16).t()
    w_turned = project(plain.weight.detach(), 16)
    rows = None if granularity == "tensor" else 0  # the contracted dimension of W and, in grad_weight, of E and X
    expected_x = rounded(e_turned, 7, 1 if of_e == "row" else None) @ rounded(w_turned, 7, rows)
    e_low, x_low = project(e, 16, rank), project(x, 16, rank)
    assert len(x_low) == 208 * (rank or 16) // 16
    x_low = rounded(x_low, 127, rows) if saved_bits is None else rounded(x_low, 7, 0)
    expected_w = rounded(e_low, 127, rows).t() @ x_low
    assert torch.equal(y, plain(x))
    torch.testing.assert_close(grad_bias, e.sum(0))
    for a, b in ((grad_x, expected_x), (grad_w, expected_w)):
        assert relative_error(a, b) < 2e-3, "but for a few ties"


@given(
    lead=st.sampled_from([(), (1,), (197,), (2, 7), (2, 3, 5, 4), (0,), (3, 0)]),
    k=st.sampled_from([16, 48, 100]),
    n=st.sampled_from([16, 7, 64]),
    bias=st.booleans(),
    hp=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_padding_is_exact_at_any_shape(lead, k, n, bias, hp):
    """int8 of the whole rank: what is left of the errors is int8's, at any number of tokens and widths."""
    plain = nn.Linear(k, n, bias=bias).to(hp)
    recipe = RECIPES["hot_llm"]
    layer = converted(plain, recipe)
    x, e = torch.randn(*lead, k).to(hp), torch.randn(*lead, n).to(hp)
    actual = gradients(layer, x, e)
    assert torch.equal(actual[0], plain(x)) and (layer.bias is None) == (not bias)
    for a, b in zip(actual, exact(plain, x, e), strict=True):
        assert a.dtype == hp
        assert b.norm() == a.norm() == 0 or relative_error(a.reshape(b.shape), b) < 0.03


def test_stochastic_rounding_is_unbiased_and_reproducible():
    x = torch.randn(16, 16)
    for format in FORMATS.values():
        noise = torch.rand(2000, 16, 16)
        scaled = (x / x.abs().max() * format.max).expand_as(noise)
        if format.bits <= 6:
            mean = round_to(scaled, format, noise).float().mean(0)
            codes = round_to(scaled[0], format).float().abs().clamp_min(1)
            assert ((mean - scaled[0]) / codes).abs().max() < 0.5 / 2000**0.5 * 5, format
        assert round_to(scaled, format, noise).float().abs().max() == format.max
    layer = converted(nn.Linear(64, 64), hot_config())
    x, e = torch.randn(64, 64), torch.randn(64, 64)

    def draw(seed):
        torch.manual_seed(seed)
        return gradients(layer, x, e)[1]

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    mean = sum(draw(seed).double() for seed in range(100)) / 100
    rotation = Rotation(16, None)
    w = reference.rotate(layer.weight.dequantize(), rotation, None)
    w = reference.unrotate(
        reference.dequantize(*reference.rotate_quantize(w, None, None, INT4, "tensor"), "tensor"), rotation, None, w.shape
    )
    assert relative_error(mean, e.double() @ w.double()) < 0.3 / 100**0.5 * 1.5


def test_the_mean_is_exact_of_rotated_bfloat16_too():
    x, rotation = torch.randn(64, 64, dtype=torch.bfloat16), Rotation(16, None)
    draws = [ops.rotate_quantize(x, None, rotation, INT8, "row", rounding="stochastic") for _ in range(400)]
    mean = sum(codes.double() for codes, _, _ in draws) / 400
    bias = mean - reference.rotate(x, None, rotation) / draws[0][2][:, None]
    # Half a step is the most that one draw can be off; rounded to bfloat16 first, the bias would be 0.06 steps.
    assert 0.01 < bias.pow(2).mean().sqrt() < 0.03


def test_codes_of_logarithms_are_powers_of_two():
    codes = round_to(torch.randn(4096) * 20, FP4_E3M0, torch.rand(4096)).float().abs().unique()
    assert codes.tolist() == [0, 1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("name", sorted(n for n in RECIPES if n.startswith(("hot", "lbp", "luq"))))
def test_every_variant(name):
    """Forward and bias are exact. Slow tokens survive a low rank; the errors are those of the variant's bits."""
    plain = nn.Linear(192, 320)
    layer = converted(plain, recipe_config(name))
    slow = torch.nn.functional.interpolate(torch.randn(2, 192 + 320, 10), 150, mode="linear").transpose(1, 2)
    x, e = slow.split([192, 320], -1)
    with OpLog() as log:
        actual = gradients(layer, x, e)
    assert len(log.products()) == (0 if name == "lbp_wht" else 2)
    y, grad_x, grad_w, grad_bias = [
        relative_error(a.reshape(b.shape), b) for a, b in zip(actual, exact(plain, x, e), strict=True)
    ]
    assert y < 1e-6 and grad_bias < 1e-6
    int4 = name in ("hot_int4", "hot_rotated_int4", "luq")
    assert (0.05 if int4 else 0 if name == "lbp_wht" else 1e-3) < grad_w < (0.6 if int4 else 0.05)
    low = {"hot_llm": 0.02, "lbp_wht": 0.09}.get(name, 1.0 if name == "hot_internal" else 0.6)
    assert (1e-3 if low < 0.1 else 0.1) < grad_x < low


def test_only_compressed_codes_are_saved_and_once():
    layers = nn.ModuleList(nn.Linear(256, 128, dtype=torch.bfloat16) for _ in range(3))
    x = torch.randn(2, 104, 256, dtype=torch.bfloat16, requires_grad=True) + 0  # of leaves nothing is shared
    with saved_bytes() as saved:
        out = [layer(x) for layer in layers]
    plain = saved(layers)
    quantize_(layers, hot_config())
    with saved_bytes() as saved:
        out = [layer(x) for layer in layers]
    assert plain == 208 * 256 * 2 and saved(layers) == 104 * 256 + 4
    assert len(out) == 3


def test_a_frozen_weight_saves_nothing_of_x():
    layer = converted(nn.Linear(128, 128), hot_config())
    layer.weight.requires_grad_(False)
    x = torch.randn(16, 128, requires_grad=True)
    with OpLog() as log, saved_bytes() as saved:
        layer(x).sum().backward()
    assert len(log.products()) == 1 and saved(layer) == 0 and x.grad is not None


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["hot", "lbp_wht"])
def test_autocast(name, master):
    plain = nn.Linear(128, 192).to(master)
    layer = converted(plain, recipe_config(name))
    x = torch.randn(64, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    grads = torch.autograd.grad(y, (x, layer.weight), torch.randn_like(y))
    assert y.dtype == torch.bfloat16 and [g.dtype for g in grads] == [torch.float32, master]


def test_checkpointing_and_compilation_draw_the_same_numbers():
    """Compiled for AOT's eager backend, the ops and so the random numbers are those of eager mode."""
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    quantize_(model, hot_config())
    x = torch.randn(32, 64, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def grads(f):
        torch.manual_seed(3)
        return torch.autograd.grad(f(x).square().sum(), [x, *model.parameters()])

    expected = grads(model)
    for f in (compiled, lambda x: checkpoint(model, x, use_reentrant=False)):
        for a, b in zip(grads(f), expected, strict=True):
            assert torch.equal(a, b)


def test_inductor_runs_it():
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU())
    x, plain = torch.randn(32, 64, requires_grad=True), copy.deepcopy(model)
    quantize_(model, hot_config(None, grad_input_bits=8, rounding="stochastic"))
    compiled = torch.compile(model, fullgraph=True)

    def grads(f, seed):
        torch.manual_seed(seed)
        return torch.autograd.grad(f(x).square().sum(), [x, *f.parameters()])

    first, again, other = (grads(compiled, seed) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    for a, b in zip(first, grads(plain, 1), strict=True):
        assert relative_error(a, b) < 0.04


def test_what_means_nothing_is_refused():
    with pytest.raises(ValueError, match="takes a power-of-two block from 2 to 256, seed=None and a rank"):
        Rotation(16, 0, 8)
    with pytest.raises(ValueError, match="rank must be from 1 to block_size=16, or None for all; got 17"):
        hot_config(17)
    with pytest.raises(ValueError, match="rounding must be one of 'stochastic', 'nearest'; got 'up'"):
        hot_config(rounding="up")
    with pytest.raises(ValueError, match="grad_input_bits must be one of 4, 8; got 6"):
        hot_config(grad_input_bits=6)
    with pytest.raises(ValueError, match="saved_bits must be one of None, 4; got 8"):
        hot_config(saved_bits=8)
    with pytest.raises(ValueError, match="grad_output_granularity must be one of 'row', 'tensor'; got 'tokens'"):
        hot_config(grad_output_granularity="tokens")
    with pytest.raises(ValueError, match="seed signs whole blocks"):
        hot_config(8, seed=1)
    with pytest.raises(ValueError, match="codes of a weight are kept in step"):
        Recipe(output=Product(Operand(INT8), Operand(INT8, rounding="stochastic")))


def test_there_and_back():
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Linear(128, 64))
    state = {name: t.clone() for name, t in model.state_dict().items()}
    report = quantize_(model, hot_config())
    assert report.converted == ["0", "1"]
    assert list(model.state_dict()) == list(state) and all(type(t) is torch.Tensor for t in model.state_dict().values())
    dequantize_(model)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("name", ["hot", "hot_int4", "hot_llm", "lbp_wht", "luq"])
def test_what_is_counted_is_what_is_saved(name):
    """The layers that read one X save it once; a k×k convolution saves positions, not windows."""
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 32, 1, groups=2), nn.Flatten(2), nn.Linear(64, 48))
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    recipe = RECIPES[name]
    layers = quantize_(model, recipe_config(name, min_features=16)).converted
    with measure_saved(model, layers) as saved:
        model(x)
    found = shapes(model, x)
    assert layers == list(found) == ["0", "1", "3"]
    assert found["0"] == Shape(128, 16 * 9, 32, 1, (128, 16), is_convolution=True)
    assert found["1"] == Shape(128, 16, 16, 2, (128, 16), is_convolution=True)
    high = 32
    assert saved.layers == sum(analysis.saved_bytes(recipe, shape, high) for shape in found.values())
    assert saved.total >= saved.layers


@pytest.mark.parametrize("rank", [None, 5])
def test_an_input_in_4_bits_takes_half_the_bytes(rank):
    """The codes of an odd number of sequencies, too. Layers that share X save it once."""
    layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
    report = quantize_(layers, hot_config(rank, saved_bits=4))
    x = torch.randn(3, 35, 64, requires_grad=True)
    with measure_saved(layers, report.converted) as saved:
        sum(layer(x * 1) for layer in layers).sum().backward()
        same = x * 1
        (layers[0](same) + layers[1](same)).sum().backward()
    codes = ((112 if rank is None else 35) + 1) // 2 * 64
    assert saved.layers == 3 * (codes + 64 * 4)
    shape = next(iter(shapes(layers[0], x).values()))
    assert analysis.saved_bytes(hot_config(rank, saved_bits=4).recipe, shape) == codes + 64 * 4


def test_bit_operations():
    shape = Shape(tokens=208, in_features=64, out_features=128, groups=1, saved=(208, 64))
    counts, products = bit_operations(RECIPES["hot"], shape), 208 * 64 * 128
    assert counts["output"] == products * 16 * 16
    assert counts["grad_input"] == products * 4 * 4
    assert counts["grad_weight"] == products // 2 * 8 * 8
    assert 0 < counts["transforms"] < 0.2 * products * 16 * 16
    external = bit_operations(RECIPES["lbp_wht"], shape)
    assert external["grad_input"] == external["grad_weight"] == products // 2 * 16 * 16


def test_saved_bytes_of_every_scale():
    """Codes take a byte, scales four; a matrix in high precision as many bits as are said; groups save each their own."""
    shape = Shape(tokens=256, in_features=48, out_features=128, groups=3, saved=(70, 48))

    def saved(scale, format=INT8, **rotations):
        operand = Operand(format, Scales.of(scale), **rotations)
        product = Product(operand, operand)
        return analysis.saved_bytes(SimpleNamespace(grad_weight=product), shape)

    assert saved("tensor") == 3 * (70 * 48 + 4) and saved("unit") == 3 * 70 * 48
    assert saved("tokens") == 3 * (70 * 48 + 4 * 70) and saved("in_features") == 3 * (70 * 48 + 4 * 48)
    assert saved("32x32") == 3 * (70 * 48 + 4 * 3 * 2)
    assert (
        analysis.saved_bytes(Recipe(), shape) == 3 * 70 * 48 * 2
        and analysis.saved_bytes(Recipe(), shape, 32) == 3 * 70 * 48 * 4
    )
