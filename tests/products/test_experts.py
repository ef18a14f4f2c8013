"""The experts of a mixture, against float64."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from halo_tensor import HaloWeight
from halo_tensor.operand.gains import of_exponents
from halo_tensor.products.experts import experts, experts_of_rows, route
from halo_tensor.products.routing import Routing
from halo_tensor.recipe import FP6_E3M2, FP8_E4M3, INT8, Gate, halo
from halo_tensor.reference.experts import activate
from tests.helpers.errors import relative_error, typical_error
from tests.helpers.expert_layers import GPT_OSS, exact_experts, routed
from tests.helpers.recording import OpLog

NAMES = ("output", "hidden_states", "top_k_weights", "gate_up", "down", "gate_up_bias", "down_bias")


def data(tokens=60, count=5, top_k=2, d=64, f=48, biased=True, unused=1):
    torch.manual_seed(0)
    x, weights = torch.randn(tokens, d), torch.rand(tokens, top_k) + 0.1
    gate_up, down = torch.randn(count, 2 * f, d) * d**-0.5, torch.randn(count, d, f) * f**-0.5
    biases = [torch.randn(count, 2 * f) * 0.3, torch.randn(count, d) * 0.3] if biased else []
    return routed(tokens, count, top_k, unused), torch.randn(tokens, d), [x, weights, gate_up, down, *biases]


def run(index, e, tensors, gate=None, recipe=None, f=experts, **options):
    """The output and all gradients."""
    x, weights, gate_up, down, *biases = given = [t.detach().clone().requires_grad_() for t in tensors]
    options |= dict(zip(("gate_up_bias", "down_bias"), biases, strict=False))
    y = f(x, index, weights, gate_up, down, gate, recipe=recipe, **options)
    return [y.detach(), *torch.autograd.grad(y, given, e)]


def exact(index, e, tensors, gate=None):
    x, weights, *rest = given = [t.double().requires_grad_() for t in tensors]
    y = exact_experts(x, index, weights, *rest, gate=gate)
    return [y.detach(), *torch.autograd.grad(y, given, e.double())]


@pytest.mark.parametrize("gate", [Gate(), GPT_OSS], ids=["swiglu", "gpt-oss"])
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("format", [INT8, FP8_E4M3, FP6_E3M2], ids=str)
def test_output_and_gradients_within_a_window(format, level, gate):
    """Two products follow each other in forward, and up to four in backward, so errors add up."""
    index, e, tensors = data(tokens=120, d=128, f=96)
    with OpLog() as log:
        actual = run(index, e, tensors, gate, halo(level, format))
    names = [name for name, _ in log.calls]
    assert names.count("grouped_mm") == 4 and names.count("grouped_grad") == 2
    assert ("quantize_gated" in names) == (level < 2), "level 2 is not fused"
    typical = typical_error(format)
    for name, a, b in zip(NAMES, actual, exact(index, e, tensors, gate), strict=True):
        if name == "down_bias":
            assert relative_error(a, b) < 1e-6
            continue
        assert 0.4 * typical < relative_error(a, b) < 2.6 * typical, name


@given(
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 40)),
    widths=st.tuples(st.sampled_from([16, 48, 64]), st.sampled_from([16, 32, 80])),
    sentinels=st.sampled_from(["none", "-1", "beyond"]),
    biased=st.booleans(),
    interleaved=st.booleans(),
)
def test_any_size_and_sentinels(sizes, widths, sentinels, biased, interleaved):
    """Copies for experts of other ranks add nothing, and an expert without tokens has gradients of exact zeros."""
    (count, tokens), (d, f) = sizes, widths
    index, e, tensors = data(tokens, count, min(2, count), d, f, biased, unused=0)
    gate = Gate(interleaved=interleaved)
    if sentinels != "none":
        elsewhere = torch.rand(index.shape) < 0.5
        index = torch.where(elsewhere, -1 if sentinels == "-1" else count + 3, index)
    actual, expected = run(index, e, tensors, gate, halo(1, INT8)), exact(index, e, tensors, gate)
    for name, a, b in zip(NAMES, actual, expected, strict=False):
        # A routing weight's gradient is a dot product, which may cancel.
        assert (a - b).norm() <= 0.1 * (b.norm() + e.norm() * (name == "top_k_weights")), name
    there = torch.zeros(count, dtype=torch.bool).scatter_(0, index[(index >= 0) & (index < count)], True)
    for gradient in actual[3:]:
        assert not gradient[~there].any()
    outside = (index < 0) | (index >= count)
    assert not actual[2][outside].any()


def test_a_function_in_place_of_the_gate():
    """It is called as it is, as for a module with its own ``_apply_gate``; the result is the same up to rounding."""
    index, e, tensors = data()
    fused = run(index, e, tensors, Gate(), halo(1, INT8))
    called = []

    def gate(h):
        called.append(h.shape)
        return activate(h, Gate())

    with OpLog() as log:
        plain = run(index, e, tensors, gate, halo(1, INT8))
    assert called == [(120, 96)] and "quantize_gated" not in [name for name, _ in log.calls]
    for name, a, b in zip(NAMES, plain, fused, strict=True):
        assert relative_error(a, b) < 0.02, name


def test_no_gate_at_all():
    """``has_gate=False``: one product up, an activation, one product down."""
    index, e, (x, weights, up, down, *_) = data(d=64, f=48)
    down = torch.randn(5, 64, 96) * 0.1
    actual = run(index, e, [x, weights, up, down], torch.relu, halo(1, INT8))
    given = [t.double().requires_grad_() for t in (x, weights, up, down)]
    y = torch.zeros_like(given[0])
    for expert in range(5):
        token, place = torch.where(index == expert)
        part = torch.relu(given[0][token] @ given[2][expert].t()) @ given[3][expert].t()
        y = y.index_add(0, token, part * given[1][token, place, None])
    expected = [y, *torch.autograd.grad(y, given, e.double())]
    for a, b in zip(actual, expected, strict=True):
        assert 0.004 < relative_error(a, b) < 0.12  # ReLU's step passes or stops what is near it


@pytest.mark.parametrize("gate", [Gate(), GPT_OSS], ids=["swiglu", "gpt-oss"])
def test_rows_that_are_sorted_already(gate):
    """With one expert a token and weights of 1, tokens in order of experts need no routing."""
    index, e, (x, _, gate_up, down) = data(top_k=1, biased=False)
    index = index.sort(0).values
    expected = run(index, e, [x, torch.ones(60, 1), gate_up, down], gate, halo(1, INT8))
    offs = route(index, 5).offs
    from halo_tensor import ops

    routing = Routing(offs, *ops.group_tiles(offs, 60))
    given = [t.clone().requires_grad_() for t in (x, gate_up, down)]
    y = experts_of_rows(given[0], None, *given[1:], routing, gate, recipe=halo(1, INT8))
    assert torch.equal(y, expected[0])
    for a, b in zip(torch.autograd.grad(y, given, e), (expected[1], *expected[3:]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("in_features_first", [False, True])
def test_converted_weights_give_the_same(in_features_first):
    """With gains, after an optimiser's step, copied, and compiled."""
    index, e, (x, weights, gate_up, down) = data(biased=False)
    recipe = halo(1, INT8)

    def parameter(t, gains=None):
        t = t.transpose(1, 2).contiguous() if in_features_first else t.clone()
        return nn.Parameter(HaloWeight.from_hp(t, recipe, gains=gains, in_features_first=in_features_first))

    model = nn.ParameterDict({"gate_up": parameter(gate_up), "down": parameter(down)})

    def step(model, f=experts):
        given = x.clone().requires_grad_()
        for p in model.values():
            p.grad = None
        y = f(given, index, weights, model["gate_up"], model["down"])
        y.backward(e)
        return [y.detach(), given.grad, model["gate_up"].grad, model["down"].grad]

    def dense(name):
        return model[name].master.detach()

    def check():
        options = {"recipe": recipe, "in_features_first": in_features_first}
        y, grad_x, _, *grads = run(index, e, [x, weights, dense("gate_up"), dense("down")], **options)
        for a, b in zip(step(model), [y, grad_x, *grads], strict=True):
            assert a.shape == b.shape and torch.equal(a, b)

    check()
    torch.optim.AdamW(model.values(), lr=0.1).step()
    check()
    expected = step(model)
    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    for again in (step(copy.deepcopy(model)), step(model, compiled)):
        assert all(map(torch.equal, again, expected))
    # A balance changes codes, and results little.
    gains = of_exponents(torch.randint(-2, 3, (64,)))
    model["gate_up"] = parameter(dense("gate_up").transpose(1, 2) if in_features_first else dense("gate_up"), gains)
    for a, b in zip(step(model), expected, strict=True):
        assert 1e-4 < relative_error(a, b) < 0.05


def test_a_gain_is_undone():
    """A power of two per feature that X and W carry inversely: an outlier of X costs less, and gradients stay those of W."""
    index, e, tensors = data(d=64, biased=False)
    tensors[0][:, 5] *= 64
    gains = of_exponents(torch.where(torch.arange(64) == 5, 3, 0))
    recipe = halo(0, INT8)
    gate_up = nn.Parameter(HaloWeight.from_hp(tensors[2].clone(), recipe, gains=gains))
    down = nn.Parameter(HaloWeight.from_hp(tensors[3].clone(), recipe))
    x = tensors[0].clone().requires_grad_()
    y = experts(x, index, tensors[1], gate_up, down)
    y.backward(e)
    balanced, plain = [y, x.grad, gate_up.grad], run(index, e, tensors, recipe=recipe)
    oracle = exact(index, e, tensors)
    errors = [relative_error(a.detach(), b) for a, b in zip(balanced, (oracle[0], oracle[1], oracle[3]), strict=True)]
    assert errors[0] < 0.5 * relative_error(plain[0], oracle[0])
    assert max(errors) < 0.06


def test_outliers_cost_little_at_level_1():
    """Cosine of gradients with float64's, with features of X that are 30 times as large as the others."""
    index, e, tensors = data(tokens=256, count=8, d=128, f=64, biased=False)
    tensors[0][:, 7] *= 30
    expected = exact(index, e, tensors)
    cosines = [
        [
            torch.nn.functional.cosine_similarity(a.double().flatten(), b.flatten(), 0).item()
            for a, b in zip(run(index, e, tensors, recipe=halo(level, INT8)), expected, strict=True)
        ]
        for level in (0, 1)
    ]
    assert min(cosines[1]) > 0.9995 and 0.99 < min(cosines[0]) < min(cosines[1])


def test_a_mixture_learns_as_in_high_precision():
    """Router and experts fit a random mixture: two seeds' losses after 30 steps lie within 3 % of float32's, and are not the
    same."""
    for seed in (0, 1):
        losses = []
        for recipe in (None, halo(1, INT8)):
            torch.manual_seed(seed)
            router, teacher = nn.Linear(32, 4, bias=False), nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
            gate_up, down = (torch.randn(4, *shape) * 0.2 for shape in ((64, 32), (32, 32)))
            experts_weights = [nn.Parameter(w if recipe is None else HaloWeight.from_hp(w, recipe)) for w in (gate_up, down)]
            optimizer = torch.optim.Adam([*router.parameters(), *experts_weights], lr=3e-3)
            for _ in range(30):
                x = torch.randn(128, 32)
                weights, index = router(x).softmax(1).topk(2)
                f = exact_experts if recipe is None else experts
                loss = (f(x, index, weights, *experts_weights) - teacher(x)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            losses.append(loss.item())
        assert 0 < abs(losses[1] / losses[0] - 1) < 0.03, losses


def test_only_what_is_needed_is_computed_and_saved():
    index, e, (x, weights, gate_up, down) = data(biased=False)
    recipe = halo(1, INT8)
    frozen = [HaloWeight.from_hp(w, recipe, frozen=True) for w in (gate_up, down)]
    with OpLog() as log:
        y = experts(x.clone().requires_grad_(), index, weights, *frozen)
        y.backward(e)
    names = [name for name, _ in log.calls]
    assert names.count("grouped_mm") == 4 and "grouped_grad" not in names and "quantize_groups_t" not in names
    with torch.no_grad(), OpLog() as log:
        assert torch.equal(experts(x, index, weights, *frozen), y)


def test_packed_codes_are_not_kept_unpacked():
    """What forward saves of a frozen fp6 layer is its weights as they are held, which take no memory of their own, and h."""
    index, _, (x, weights, gate_up, down) = data(tokens=8, biased=False)
    frozen = [HaloWeight.from_hp(w, halo(1, FP6_E3M2), frozen=True) for w in (gate_up, down)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = experts(x.clone().requires_grad_(), index, weights, *frozen)
    held = {w.operand.codes.data_ptr() for w in frozen}
    assert held <= {t.data_ptr() for t in saved}
    assert max(t.numel() for t in saved if t.data_ptr() not in held) == 16 * 96, "h is the largest"
    y.sum().backward()


def test_errors_name_what_does_not_fit():
    index, _, (x, weights, gate_up, down) = data(biased=False)
    with pytest.raises(ValueError, match="the gate makes 48 features of 96, and down reads 32"):
        experts(x, index, weights, gate_up, down[:, :, :32], recipe=halo(1, INT8))
    with pytest.raises(ValueError, match="must be of one dtype"):
        experts(x.bfloat16(), index, weights, gate_up, down, recipe=halo(1, INT8))
    given = x.clone().requires_grad_()
    y = experts(given, index, weights, gate_up, down, recipe=halo(1, INT8)).sum()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(y, given, create_graph=True)
