"""``balance_``: it changes rounding errors only, and nothing outside of the layer sees it."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from halo_tensor import HadamardQuantTensor, balance_, dequantize_, halo_config, keep_products, quantize_, recipe_config
from halo_tensor.calibration.balance import FORWARD, Statistics, _exponents, _groups, fourth_power, observed
from halo_tensor.layers.linear import convert_weight
from halo_tensor.operand import gains
from halo_tensor.recipe import INT8, Operand, Product, Recipe, Rotation, Scales
from halo_tensor.weight.tensor import HaloWeight
from tests.helpers.errors import relative_error
from tests.helpers.graphs import graphs
from tests.helpers.linear_layers import converted, everything, exact, gradients
from tests.helpers.recording import OpLog, saved_bytes
from tests.helpers.training import Mlp, step_alike, train
from tests.helpers.weights import in_step

OUTLIERS = slice(None, None, 29)


class Attention(nn.Module):
    def __init__(self, width: int = 128):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x):
        return self.o(self.q(x) * self.k(x).tanh() + self.v(x))


def with_outliers(plain: nn.Linear, *shape: int, factor: float = 32.0):
    """Return X with outlier channels, and divide the layer's columns by the same factor."""
    x = torch.randn(*shape, plain.in_features)
    x[..., OUTLIERS] *= factor
    with torch.no_grad():
        plain.weight[:, OUTLIERS] /= factor
    return x.to(plain.weight.dtype)


def balanced(config=None, width: int = 128):
    """Return a balanced model, the input it was balanced on, and the plain model."""
    plain = Attention(width)
    x = torch.randn(32, width)
    x[:, OUTLIERS] *= 32
    model = copy.deepcopy(plain)
    quantize_(model, config or halo_config(1, "int8"))
    assert balance_(model, x) == 4
    return model, x, plain


# Its purpose.


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_outlier_channels_do_not_increase_the_error_of_int8(level, granularity):
    """Output and both gradients have the error that int8 has on data without outliers.

    The error is also no smaller, as it would be in high precision. Without a balance the output's error is 3 times as large.
    """
    plain = nn.Linear(256, 192)
    x, e = with_outliers(plain, 2, 64), torch.randn(2, 64, 192)
    layer = converted(plain, halo_config(level, "int8", granularity=granularity))
    before = gradients(layer, x, e)
    assert balance_(layer, x) == 1
    with OpLog() as log:
        after = gradients(layer, x, e)
    assert log.products() == [torch.int8] * 3
    expected = exact(plain, x, e)
    for name, a, b, c in zip(("output", "grad_input", "grad_weight"), after, before, expected, strict=False):
        error, earlier = (relative_error(y.reshape(c.shape), c) for y in (a, b))
        # E_X is large where X is small, and G where it is large: their norms see only some of what has become better.
        assert 0.004 < error < 0.02, name
        if name == "output":
            assert error < earlier / 3
    assert relative_error(after[3], expected[3]) < 1e-6


def test_small_channels_of_the_gradient_become_more_exact():
    """Columns of G where X is small are more exact, as they are not rounded together with outliers."""
    plain = nn.Linear(256, 192, bias=False)
    x, e = with_outliers(plain, 512), torch.randn(512, 192)
    layer = converted(plain, halo_config(1, "int8"))
    small = torch.ones(256, dtype=torch.bool)
    small[OUTLIERS] = False
    expected = exact(plain, x, e)[2][:, small]
    before = relative_error(gradients(layer, x, e)[2][:, small], expected)
    balance_(layer, x)
    after = relative_error(gradients(layer, x, e)[2][:, small], expected)
    assert 0.004 < after < 0.03 and after < before / 2.5


def test_products_with_gains_follow_the_formulas():
    """Compare Y, E_X and G of HALO-1 with float64 and dense rotations, where X is divided and W multiplied by s."""
    from tests.helpers.linear_layers import rotation_matrix

    m, k, n = 128, 192, 256
    plain = nn.Linear(k, n, bias=False)
    x, e = with_outliers(plain, m, factor=20.0), torch.randn(m, n)
    layer = converted(plain, halo_config(1, "int8"))
    balance_(layer, x)
    actual = gradients(layer, x, e)
    s = layer.weight.gain.double()
    assert s.max() / s.min() >= 8
    h = rotation_matrix(Rotation(64), k)
    x, w, e = (x.double() / s) @ h, (plain.weight.detach().double() * s) @ h, e.double()
    s_x, s_w = x.abs().amax(1) / 127, w.abs().amax(1) / 127
    x_codes, w_codes = (x / s_x[:, None]).round(), (w / s_w[:, None]).round()

    def rounded(t, dim):
        scale = t.abs().amax(dim, keepdim=True) / 127
        return (t / scale).round() * scale

    grad_input = rounded(e * s_w, 1) @ w_codes @ h.t() / s
    grad_weight = rounded(e * s_x[:, None], 0).t() @ x_codes @ h.t() * s
    y = (x_codes * s_x[:, None]) @ (w_codes * s_w[:, None]).t()
    for a, b in zip(actual, (y, grad_input, grad_weight), strict=True):
        assert relative_error(a, b) < 1e-3  # float32 and float64 round a few ties differently


# Gains cancel.


@given(
    lead=st.sampled_from([(1,), (7,), (2, 5)]),
    k=st.sampled_from([1, 7, 48, 136, 576]),
    n=st.sampled_from([1, 5, 64]),
    level=st.sampled_from((0, 1, 2)),
    dtype=st.sampled_from(("int8", "fp8", "fp6_e2m3", "fp6_e3m2")),
    granularity=st.sampled_from(("row", "tensor")),
    hp=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bias=st.booleans(),
    frozen=st.booleans(),
)
def test_balanced_products_are_right_for_any_shape_and_format(lead, k, n, level, dtype, granularity, hp, bias, frozen):
    plain = nn.Linear(k, n, bias=bias).to(hp)
    layer = converted(plain, halo_config(level, dtype, granularity=granularity, frozen=frozen))
    x, e = torch.randn(*lead, k).to(hp), torch.randn(*lead, n).to(hp)
    assert balance_(layer, x) == 1
    s = layer.weight.gain
    assert s.dtype == torch.float32 and s.shape == (k,) and (s.log2() % 1 == 0).all()
    assert torch.equal(s * layer.weight.undo_gain, torch.ones(k))
    if frozen:
        layer.weight.requires_grad_(False)
        actual, wanted = [layer(x)], exact(plain, x, e)[:1]
    else:
        actual, wanted = gradients(layer, x, e), exact(plain, x, e)
    for a, b in zip(actual, wanted, strict=True):
        assert a.dtype == hp and a.isfinite().all()
        if b.norm() > 0.1 * b.numel() ** 0.5:
            assert relative_error(a.reshape(b.shape), b) < 0.35
    assert relative_error(layer.weight.dequantize(), plain.weight) < 0.25


def test_a_gain_of_ones_changes_no_bit():
    layer = converted(nn.Linear(128, 64), halo_config(2, "int8"))
    x, e = torch.randn(32, 128), torch.randn(32, 64)
    expected = gradients(layer, x, e)
    layer.weight.operand.gains = gains.of_exponents(torch.zeros(128))
    layer.weight.requantize()
    for a, b in zip(gradients(layer, x, e), expected, strict=True):
        assert torch.equal(a, b)


def test_a_common_factor_of_the_gain_changes_no_bit():
    """A common factor moves into the scales exactly."""
    layer = converted(nn.Linear(128, 64), halo_config(1, "int8"))
    x, e = torch.randn(32, 128), torch.randn(32, 64)
    balance_(layer, x * torch.logspace(-1, 1, 128))
    exponents = layer.weight.gain.log2()
    expected = gradients(layer, x, e)
    layer.weight.operand.gains = gains.of_exponents(exponents + 3)
    layer.weight.requantize()
    for a, b in zip(gradients(layer, x, e), expected, strict=True):
        assert torch.equal(a, b)


def test_gains_cancel_under_custom_recipes():
    """X and W have another operand in each product, and one grad_weight is plain."""
    r = Rotation()
    x, w = (
        Operand(INT8, Scales.per(tokens=1), tokens=r, in_features=r),
        Operand(INT8, Scales.per(out_features=1), in_features=r),
    )
    own = Recipe(
        output=Product(Operand(INT8, Scales.per(tokens=1), in_features=r), w),
        grad_input=Product(
            Operand(INT8, Scales.per(tokens=1), out_features=r),
            Operand(INT8, Scales.per(in_features=1), in_features=r, out_features=r),
        ),
        grad_weight=Product(Operand(INT8, Scales.per(out_features=1), tokens=r), x),
    )
    for recipe in (own, recipe_config("switchback").recipe, recipe_config("jetfire").recipe):
        plain = nn.Linear(192, 320)
        inputs, e = torch.randn(256, 192) * torch.logspace(-0.5, 0.5, 192), torch.randn(256, 320)
        layer = converted(plain, recipe)
        assert balance_(layer, inputs) == 1
        for a, b in zip(gradients(layer, inputs, e), exact(plain, inputs, e), strict=True):
            assert relative_error(a, b) < 0.02


# The choice of s.


def errors(x, w, s):
    """Return the sum that s minimises, as the module's docstring states it.

    ``x`` and ``w`` are mean squares [in]. The terms are those of the three products, and the fourth one.
    """
    forward = FORWARD * (x / s**2).sum() * (w * s**2).sum() / (x * w).sum()
    grad_input = (1 / s**2).sum() * (w * s**2).sum() / w.sum()
    grad_weight = (x / s**2).sum() * (s**2).sum() / x.sum()
    return forward + grad_input + grad_weight + (1 / s**2).sum() * (s**2).sum() * (x * w).sum() / (FORWARD * x.sum() * w.sum())


@given(
    spread=st.sampled_from([0.0, 1.0, 4.0]), size=st.sampled_from([1e-3, 0.1, 1.0]), scale=st.sampled_from([1e-8, 1.0, 1e8])
)
def test_no_other_s_has_smaller_errors(spread, size, scale):
    x, w = scale * (spread * torch.randn(2, 96, dtype=torch.float64)).exp()
    s = fourth_power(x, w) ** 0.25
    least = errors(x, w, s)
    for _ in range(8):
        assert errors(x, w, s * (size * torch.randn(96, dtype=torch.float64)).exp()) >= least * (1 - 1e-12)
    assert torch.allclose(errors(x, w, 2 * s), least), "a common factor cancels"


def test_s_of_columns_is_rounded_and_clamped():
    layer = nn.Linear(64, 32, bias=False)
    x = torch.ones(16, 64)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        x[:, :8], layer.weight[:, 8:16] = 2.0**6, 2.0**6
        x[:, 16], layer.weight[:, 17] = 0.0, 0.0
    quantize_(layer, halo_config(1, "int8", min_features=0))
    balance_(layer, x)
    exponents = layer.weight.gain.log2()
    x2, w2 = x.double().square().mean(0), layer.weight.detach().double().square().mean(0)
    wanted = (fourth_power(x2, w2).log2()[0] / 4).item()
    assert wanted == pytest.approx(2.92, abs=0.01), "less than the 3 at which forward's error alone is least"
    assert (exponents[:8] == 3).all() and (exponents[8:16] == -3).all()
    assert (exponents[16:18] == 0).all(), "nothing of X or of W to balance"
    assert (exponents[18:] == 0).all()
    before = layer.weight.gain
    balance_(layer, torch.ones(16, 64))
    assert layer.weight.gain is not before and (layer.weight.gain[:8] == 1).all(), "replaced"
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.weight[:, 0] = 2.0**-30
    balance_(layer, torch.ones(16, 64).index_fill(1, torch.tensor([0]), 2.0**30))
    assert layer.weight.gain[0] == 2.0**8 and (layer.weight.gain[1:] == 1).all(), "clamped"


def test_layers_that_read_one_tensor_have_one_s_and_one_x():
    model, x, _ = balanced()
    x = x.clone().requires_grad_() + 0  # what another layer would give: eager sharing is of such
    assert model.q.weight.gain is model.k.weight.gain is model.v.weight.gain is not model.o.weight.gain
    for copied in (model, copy.deepcopy(model), copy.deepcopy(model).to(torch.float64).float()):
        with _counted() as made:
            copied(x)
        assert made == [(32, 128)] * 2, "X of q, k and v once, and that of o"
    # With gains of their own, each has its own X, although the operand is the same.
    model.k.weight.operand.gains = gains.of_exponents(torch.ones(128))
    model.k.weight.requantize()
    x = x.clone()
    with _counted() as made:
        y = model.k(x), model.q(x), model.v(x)
    assert len(made) == 2
    for layer, actual in zip((model.k, model.q, model.v), y, strict=True):
        assert relative_error(actual, F.linear(x, layer.weight.master)) < 0.06


class _counted:
    """Record the shapes of tensors that are quantised. A dispatch mode would switch eager sharing off."""

    def __enter__(self):
        self.shapes, self.original = [], HadamardQuantTensor.from_hp.__func__

        def from_hp(cls, x, *args, **kwargs):
            self.shapes.append(tuple(x.shape))
            return self.original(cls, x, *args, **kwargs)

        HadamardQuantTensor.from_hp = classmethod(from_hp)
        return self.shapes

    def __exit__(self, *_):
        HadamardQuantTensor.from_hp = classmethod(self.original)


def test_tied_weights_and_layers_called_twice():
    model = nn.ModuleList([nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False)])
    model[1].weight = model[0].weight
    model.forward = lambda x: model[1](model[0](x)) + model[0](2 * x)
    quantize_(model, halo_config(1, "int8"), filter_fn=everything)
    assert balance_(model, torch.randn(16, 128)) == 2
    assert model[1].weight is model[0].weight and in_step(model[0].weight)


def test_layers_that_are_not_reached_or_not_quantised_are_left():
    model = nn.ModuleList([nn.Linear(128, 128), nn.Linear(128, 128), nn.Linear(128, 128)])
    model.forward = lambda x: model[2](model[0](x))
    quantize_(model, halo_config(1, "int8"), filter_fn=lambda m, name: name in ("0", "1"))
    quantize_(model, recipe_config("hot_llm"), filter_fn=lambda m, name: name == "2")
    assert balance_(model, x=torch.randn(16, 128)) == 1
    assert [getattr(layer.weight, "gain", None) is None for layer in model] == [False, True, True]


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(Mlp(), nn.Dropout(0.5), nn.BatchNorm1d(128))
    quantize_(model, halo_config(1, "int8"))
    parameters = list(model.parameters())
    values = [p.detach().clone() for p in parameters] + [b.clone() for b in model.buffers()]
    hooks = [dict(m._forward_pre_hooks) for m in model.modules()]
    state = torch.get_rng_state()
    balance_(model, torch.randn(16, 128, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), state) and all(m.training for m in model.modules())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True)), "an optimiser may hold them"
    now = [*model.parameters(), *model.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(now, values, strict=True))
    assert [dict(m._forward_pre_hooks) for m in model.modules()] == hooks


# In a training script.


@pytest.mark.parametrize("name", ["adamw", "adamw_fused", "sgd_foreach"])
def test_optimizers_see_the_plain_weight(name):
    model, _, plain = balanced()
    step_alike(name, plain, model)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(q.master, p) and in_step(q)


def test_every_kind_of_write_reaches_the_codes():
    weight = balanced()[0].q.weight
    other = balanced(halo_config(1, "int8"))[0].q.weight
    gain = weight.gain
    writes = (
        lambda: weight.mul_(2),
        lambda: weight.copy_(torch.randn(128, 128)),
        lambda: weight.copy_(other.detach()),  # balanced otherwise, so its codes are others
        lambda: weight.data.neg_(),
        lambda: setattr(weight, "data", torch.randn(128, 128)),
        lambda: weight.__setitem__((3, 5), 100.0),
        lambda: weight[2:4].zero_(),
    )
    with torch.no_grad():
        for write in writes:
            write()
            assert in_step(weight) and weight.gain is gain


def test_training_follows_high_precision_and_state_dicts_are_plain():
    torch.manual_seed(1)
    plain = nn.Sequential(Mlp(), Mlp())
    model = copy.deepcopy(plain)
    quantize_(model, halo_config(1, "int8"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    balance_(model, torch.randn(64, 128))
    after = model.state_dict()
    assert after.keys() == plain.state_dict().keys() and all(type(v) is torch.Tensor for v in after.values())
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert train(model, 20)[-1] == pytest.approx(train(plain, 20)[-1], rel=0.01)
    assert all(in_step(p) for p in model.parameters() if isinstance(p, HaloWeight))
    for assign in (False, True):
        model.load_state_dict(plain.state_dict(), assign=assign)
        assert model[0].up.weight.gain is not None and in_step(model[0].up.weight)


def test_copies_pickles_and_moved_models_keep_the_balance():
    model, x, _ = balanced()
    expected, e = model(x), torch.randn(32, 128)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert loaded.q.weight.gain is loaded.k.weight.gain
    for other in (copy.deepcopy(model), loaded):
        for a, b in zip(gradients(other.q, x, e), gradients(model.q, x, e), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(other(x), expected)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.q.weight.gain.dtype == torch.float32 and half.q.weight.master.dtype == torch.bfloat16
    assert in_step(half.q.weight) and relative_error(half(x.bfloat16()), expected) < 0.1


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "fp6"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_balance_waits_for_a_weight_that_goes_to_meta(frozen, dtype, assign):
    """The meta device has no values and state dicts have no balance. It is kept until values return."""
    model, x, _ = balanced(halo_config(1, dtype, frozen=False))
    quantize_(model, halo_config(1, dtype, frozen=frozen))
    plain = model.state_dict()
    meta = copy.deepcopy(model).to("meta")
    meta.q.weight.data.mul_(2)
    assert all(weight.is_meta for weight in meta.state_dict().values())
    assert all(weight.is_meta and weight.operand.codes.is_meta for weight in meta.parameters())
    back = meta if assign else meta.to_empty(device="cpu")
    for m in (model, back):
        m.load_state_dict(plain, assign=assign)
    assert torch.equal(back.q.weight.gain, model.q.weight.gain) and back.q.weight.gain is back.k.weight.gain
    # A frozen weight that is given its own value keeps its codes; another one rounds the value again, to nearly the same.
    assert relative_error(back(x), model(x)) <= (1e-6 if frozen else 0)


def test_a_balance_that_was_loaded_to_meta_is_lost_with_a_warning():
    model, x, _ = balanced()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    meta = torch.load(buffer, weights_only=False, map_location="meta")
    with pytest.warns(UserWarning, match="call balance_ again"):
        back = meta.to_empty(device="cpu")
    back.load_state_dict(model.state_dict())
    assert back.q.weight.gain is None and balance_(back, x) == 4
    assert torch.equal(back(x), model(x))


def test_converting_again_keeps_it_and_dequantize_removes_it():
    model, x, plain = balanced()
    gain = model.q.weight.gain
    quantize_(model, halo_config(0, "fp8"))
    assert model.q.weight.gain is gain and in_step(model.q.weight)
    quantize_(model, recipe_config("hot_llm"))
    assert model.q.weight.gain is None
    dequantize_(model)
    assert torch.equal(model(x), plain(x))
    quantize_(model, halo_config(1, "int8"))
    assert model.q.weight.gain is None


@pytest.mark.parametrize("dtype", ["int8", "fp6"])
def test_frozen_weights_can_be_balanced_before_or_after_freezing(dtype):
    """Weights that are balanced and then frozen are rounded once; frozen and then balanced, twice."""
    torch.manual_seed(0)
    model, x, plain = balanced(halo_config(1, dtype, frozen=False))
    once, twice = copy.deepcopy(model), copy.deepcopy(plain)
    quantize_(once, halo_config(1, dtype, frozen=True))
    quantize_(twice, halo_config(1, dtype, frozen=True))
    expected = copy.deepcopy(twice)(x)
    assert balance_(twice, x) == 4
    assert torch.equal(once(x), model(x))
    for frozen in (once, twice):
        assert frozen.q.weight.master is None and frozen.q.weight.gain is frozen.k.weight.gain
        error = relative_error(frozen.q.weight.dequantize(), plain.q.weight)
        assert 0.003 < error < (0.03 if dtype == "int8" else 0.12)
        copied = copy.deepcopy(frozen)
        assert torch.equal(copied(x), frozen(x)) and copied.q.weight.gain is copied.k.weight.gain
        frozen.q.weight.data = frozen.q.weight.dequantize() * 2
        torch.testing.assert_close(frozen.q.weight.dequantize(), 2 * copied.q.weight.dequantize(), atol=0.05, rtol=0.1)
    if dtype == "int8":
        assert relative_error(model(x), plain(x)) < 0.8 * relative_error(expected, plain(x))


def test_checkpointing_works_and_gains_are_saved_without_a_copy():
    """Gains that are saved for backward share memory with the weight's gains."""
    model, x, plain = balanced()
    unbalanced = copy.deepcopy(plain)
    quantize_(unbalanced, halo_config(1, "int8"))
    x.requires_grad_()
    sizes = []
    for f in (model, unbalanced):
        with saved_bytes() as saved:
            y = f(x)
        sizes.append(saved(f))
    assert sizes[0] == sizes[1] and y.requires_grad
    expected = _all_gradients(model, x, model)
    for options in ({}, {"context_fn": keep_products}):
        actual = _all_gradients(lambda t, options=options: checkpoint(model, t, use_reentrant=False, **options), x, model)
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)


def test_a_balanced_layer_under_autocast():
    plain = nn.Linear(128, 192)
    x = with_outliers(plain, 64).requires_grad_()
    layer = converted(plain, halo_config(1, "int8"))
    with torch.autocast("cpu", torch.bfloat16):
        balance_(layer, x)
        y = layer(x)
    e = torch.randn_like(y)
    actual = [y, *torch.autograd.grad(y, (x, layer.weight), e)]
    assert [t.dtype for t in actual] == [torch.bfloat16, torch.float32, torch.float32]
    for a, b in zip(actual, exact(plain, x.detach(), e), strict=False):
        assert 0.004 < relative_error(a, b) < 0.03


# Compiled.


@pytest.fixture
def _fresh():
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.usefixtures("_fresh")
def test_a_compiled_model_is_one_graph_that_quantises_x_once():
    model, x, _ = balanced()
    x.requires_grad_()
    forward, backward = graphs(model, x).split("backward:")
    assert forward.count("rotate_quantize") == 2, "of what q, k and v read, and of what o does"
    assert forward.count("scaled_mm") == 4 and backward.count("scaled_mm") == 8
    assert "mul.Tensor" not in forward.split("scaled_mm")[0], "the gain belongs to the op"
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(_all_gradients(f, x, model) for f in (model, compiled)), strict=True):
        assert torch.equal(a, b)


def _all_gradients(f, x, model):
    y = f(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


@pytest.mark.usefixtures("_fresh")
def test_balancing_after_compilation_and_twice():
    """The second balance and further blocks need no compilation."""
    blocks = nn.ModuleList(Mlp() for _ in range(3))
    quantize_(blocks, halo_config(1, "int8"))
    blocks.forward = lambda x: blocks[2](blocks[1](blocks[0](x)))
    for block in blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    for factor in (None, 4.0, 16.0):
        x = torch.randn(16, 128)
        if factor:
            balance_(blocks, x * torch.logspace(0, factor, 128))
        y = blocks(x)
        with torch.compiler.set_stance("force_eager"):
            assert torch.equal(blocks(x), y)
        # x of the first block needs no gradient, that of the others does.
        assert counters["stats"]["unique_graphs"] == (4 if factor else 2)


@pytest.mark.usefixtures("_fresh")
def test_a_compiled_optimizer_writes_codes():
    model, x, _ = balanced()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = torch.compile(optimizer.step, backend="aot_eager")
    for _ in range(2):
        model(x).square().mean().backward()
        step()
    assert all(in_step(p) for p in model.parameters())


# Errors.


def test_bad_input_gets_one_clear_error():
    with pytest.raises(ValueError, match=r"no layer of this Linear was balanced: of 0 converted .* Convert it with quantize_"):
        balance_(nn.Linear(128, 128), torch.randn(4, 128))
    layer = converted(nn.Linear(128, 128), halo_config(1, "int8"))
    with pytest.raises(ValueError, match="none was called with any tokens"):
        balance_(layer, torch.randn(0, 128))
    for tensor, what in ((torch.full((4, 128), torch.nan), "input"), (None, "weight")):
        if tensor is None:
            layer.weight.data[0, 0] = torch.inf
        with pytest.raises(ValueError, match=f"the {what} of .* has a NaN or Inf"):
            balance_(layer, torch.randn(4, 128) if tensor is None else tensor)
        assert layer.weight.gain is None
    with pytest.raises(ValueError, match="on the meta device"):
        balance_(copy.deepcopy(layer).to("meta"), torch.randn(4, 128, device="meta"))


def test_operands_whose_gains_do_not_cancel_are_refused():
    x, w = torch.randn(16, 64), torch.randn(32, 64)
    pair, other = gains.of_exponents(torch.arange(64) % 5), gains.of_exponents(torch.arange(64) % 3)
    from_hp = HadamardQuantTensor.from_hp
    b = from_hp(w, INT8, gains=pair)
    y = torch.mm(from_hp(x, INT8, gains=pair[::-1]), b.t())
    assert 0.004 < relative_error(y, x.double() @ w.double().t()) < 0.05
    assert relative_error(b.dequantize(), w) < 0.05 and torch.equal(b.t().dequantize(), b.dequantize().t())
    e = torch.randn(16, 32)
    y = torch.mm(from_hp(e, INT8, "tensor"), from_hp(w, INT8, "tensor", gains=pair))
    assert 0.004 < relative_error(y, e.double() @ w.double()) < 0.1, "undone on the columns of the result"
    equal = tuple(t.clone() for t in pair[::-1])
    torch.mm(from_hp(x, INT8, gains=equal), b.t())
    for a in (from_hp(x, INT8), from_hp(x, INT8, gains=pair), from_hp(x, INT8, gains=other[::-1])):
        with pytest.raises(ValueError, match="the gain of one must be the inverse of the other's"):
            torch.mm(a, b.t())
    with pytest.raises(ValueError, match="the gain of the left one's rows is not undone"):
        torch.mm(from_hp(w, INT8, "tensor", gains=pair).t(), from_hp(e.t().contiguous(), INT8, "tensor"))
    with pytest.raises(ValueError, match=r"gains \[64\] do not fit the columns of \[16, 32\]"):
        from_hp(e, INT8, gains=pair)
    with pytest.raises(ValueError, match="or there is no format"):
        from_hp(x, None, gains=pair)


def test_the_weight_of_a_recipe_without_codes_takes_no_gain():
    layer = nn.Linear(128, 128)
    convert_weight(layer, recipe_config("hot_llm").recipe)
    with pytest.raises(ValueError, match="of 0 converted"):
        balance_(layer, torch.randn(4, 128))


def test_statistics_of_balance_are_means_over_rows():
    """All rows of several calls, and of layers that share an s, count the same."""
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
