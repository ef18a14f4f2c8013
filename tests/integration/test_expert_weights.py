"""The life of the weights of experts [experts, out, in]: frozen as codes, trained, written, copied, saved, compiled."""

import copy
import io

import pytest
import torch
from expecttest import assert_expected_inline
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.compile_fx import partition_fn
from torch.distributed._tools.common_utils import get_untyped_storages
from torch.utils.checkpoint import checkpoint

from halo_tensor import HaloWeight, NonFiniteError, checkpointing, find_nonfinite, keep_products
from halo_tensor.products.experts import experts, grouped_linear
from halo_tensor.recipe import FP6_E2M3, FP8_E4M3, INT8, halo
from tests.helpers.errors import relative_error
from tests.helpers.graphs import graphs
from tests.helpers.mixtures import convert, mixtures
from tests.helpers.recording import OpLog, saved_bytes
from tests.helpers.training import OPTIMIZERS, step_alike

RECIPE = halo(1, INT8)
FORMATS = [INT8, FP8_E4M3, FP6_E2M3]
KINDS = {"trained": {}, "frozen": {"frozen": True}, "no codes": {"keep_codes": False}, "in first": {"in_features_first": True}}


def weights(model: nn.Module) -> list[HaloWeight]:
    return [p for p in model.parameters() if isinstance(p, HaloWeight)]


def fresh(model: nn.Module) -> nn.Module:
    """The same model, converted anew from its masters."""
    plain = mixtures(None)
    plain.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    return convert(plain, weights(model)[0].recipe)


def in_step(weight: HaloWeight) -> bool:
    made = HaloWeight.from_hp(weight.master, weight.recipe, in_features_first=weight.in_features_first).operand
    return all(map(torch.equal, made.parts, weight.operand.parts))


def results(model, x, e=None) -> list[torch.Tensor]:
    """The output and all gradients."""
    x = x.clone().requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], torch.ones_like(y) if e is None else e)]


def counts(log: OpLog, *names: str) -> list[int]:
    called = [name for name, _ in log.calls]
    return [called.count(name) for name in names]


@pytest.fixture
def x():
    return torch.randn(32, 64, generator=torch.Generator().manual_seed(0))


# Frozen experts.


@pytest.mark.parametrize(("format", "share"), [(INT8, 0.52), (FP8_E4M3, 0.52), (FP6_E2M3, 0.38)], ids=str)
def test_frozen_experts_are_their_codes(format, share):
    """Bytes of bf16, outputs and gradients of X as of a trained weight, and the error of one rounding."""
    plain = mixtures(None, layers=1, count=2, d=512, f=512).bfloat16()
    trained, held = (convert(copy.deepcopy(plain), halo(1, format), frozen=frozen) for frozen in (False, True))
    for weight, dense in zip(weights(held), (plain[0].gate_up, plain[0].down), strict=True):
        assert weight.master is None and not weight.requires_grad and weight.turned_stack is None
        size = sum(s.nbytes() for s in get_untyped_storages(weight))
        assert (share - 0.02) * dense.nbytes < size <= share * dense.nbytes
        assert 0.003 < relative_error(weight.dequantize(), dense) < (0.01 if format == INT8 else 0.06)
    x = torch.randn(16, 512, dtype=torch.bfloat16)
    with OpLog() as log:
        actual = results(held, x)
    assert counts(log, "grouped_mm", "grouped_grad", "quantize_groups_t") == [4, 0, 0]
    y, grad_x, *_, grad_router = results(trained, x)
    assert all(map(torch.equal, actual, (y, grad_x, grad_router)))
    with saved_bytes() as saved:
        held(x.requires_grad_())
    h = 16 * 2 * 2 * 512 * 2
    assert h < saved(held) < 2 * h, "what is between the products, and what the router saves"


def test_a_frozen_weight_cannot_be_trained(x):
    held = mixtures(frozen=True, layers=1)
    held[0].down.requires_grad_(True)
    with pytest.raises(ValueError, match=r"experts: this weight was frozen when it was converted and is held as codes only"):
        held(x)
    with pytest.raises(RuntimeError, match="cannot be written through a view"):
        held[0].gate_up.data[0] = 1
    before = held[0].gate_up.dequantize()
    held[0].gate_up.data += 1  # as merging an adapter does
    torch.testing.assert_close(held[0].gate_up.dequantize(), before + 1, atol=0.05, rtol=0)


# Optimisers and writes.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_moves_experts_as_plain_parameters(name):
    plain, model = mixtures(None, layers=1), mixtures(layers=1)
    step_alike(name, plain, model)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q.dequantize() if isinstance(q, HaloWeight) else q)
    assert all(map(in_step, weights(model)))


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_codes_are_made_once_a_step(x, options):
    """In one op for all weights that are alike, however many micro-batches there are."""
    model = mixtures(f=64)  # both matrices are rotated by blocks of 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
    for _ in range(2):
        with OpLog() as log:
            for _ in range(3):
                model(x).square().sum().backward()
        assert counts(log, "requantize_", "rotate_quantize_", "rotate_quantize") == [0, 0, 6]
        with OpLog() as log:
            optimizer.step()
        assert counts(log, "requantize_", "rotate_quantize_", "turn_stack_") == [1, 0, 4]
        assert all(map(in_step, weights(model)))


def test_gradients_accumulate(x):
    model = mixtures()
    both = [results(model, part)[2:] for part in (x[:16], x[16:])]
    for part in (x[:16], x[16:]):
        model(part).sum().backward()
    for p, a, b in zip(model.parameters(), *both, strict=True):
        assert torch.equal(p.grad, a + b)


WRITES = {
    "in place": lambda m: [w.mul_(-2) for w in weights(m)],
    "data": lambda m: [w.data.mul_(-2) for w in weights(m)],
    "an expert": lambda m: [w[1].mul_(-2) for w in weights(m)],
    "a slice of rows": lambda m: [w[:, 3:20].zero_() for w in weights(m)],
    "a list": lambda m: torch._foreach_mul_(weights(m), -2.0),
    "a state dict": lambda m: [v.mul_(-2) for v in m.state_dict().values()],
    "a state dict's data": lambda m: [v.data.mul_(-2) for v in m.state_dict().values()],
    "master": lambda m: [w.master.mul_(-2) for w in weights(m)],
    "loading": lambda m: m.load_state_dict({k: -2 * v for k, v in m.state_dict().items()}),
    "loading with assign": lambda m: m.load_state_dict({k: -2 * v for k, v in m.state_dict().items()}, assign=True),
    "replaced data": lambda m: [setattr(w, "data", -2 * w.detach().dequantize()) for w in weights(m)],
}


@pytest.mark.parametrize("name", WRITES)
def test_every_write_reaches_the_codes(x, name):
    model = mixtures()
    before = model(x)
    with torch.no_grad():
        WRITES[name](model)
    y = model(x)
    assert torch.equal(y, fresh(model)(x)) and not torch.equal(y, before)
    with torch.no_grad():
        WRITES[name](model)
    actual, expected = results(model, x), results(fresh(model), x)
    assert all(map(torch.equal, actual, expected))


# Copies and files.


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles(x, kind):
    model = mixtures(**KINDS[kind])
    if kind == "no codes":
        assert all(w.operand is None for w in weights(model))
    expected = results(model, x)
    torch.save(model, whole := io.BytesIO())
    torch.save([w.detach() for w in weights(model)], alone := io.BytesIO())
    whole.seek(0), alone.seek(0)
    there_and_back = copy.deepcopy(model).to(torch.float64).to(torch.float32)
    for again in (copy.deepcopy(model), torch.load(whole, weights_only=False), there_and_back):
        assert [type(p) for p in again.parameters()] == [type(p) for p in model.parameters()]
        assert all(map(torch.equal, results(again, x), expected))
        assert [w.in_features_first for w in weights(again)] == [kind == "in first"] * 4
    for loaded, w in zip(torch.load(alone, weights_only=True), weights(model), strict=True):
        assert isinstance(loaded, HaloWeight) and torch.equal(loaded.dequantize(), w.dequantize())
    half = model.to(torch.bfloat16)
    y = half(x.bfloat16())
    assert y.dtype == torch.bfloat16 and 1e-4 < relative_error(y.float(), expected[0]) < 0.05
    assert all(
        w.dtype == torch.bfloat16 and w.turned_stack is not None for w in weights(half) if kind in ("trained", "in first")
    )
    assert all(w.is_meta and isinstance(w, HaloWeight) for w in weights(half.to("meta")))


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_are_plain(x, kind):
    """They are saved from converted models and read by plain ones, and the other way round."""
    model, first = mixtures(**KINDS[kind]), kind == "in first"
    state = model.state_dict()
    assert all(type(v) is torch.Tensor for v in state.values())
    plain = mixtures(None)
    if not first:
        assert list(state) == list(plain.state_dict())
        plain.load_state_dict(state, strict=True)
        assert relative_error(plain(x), model(x)) < 0.05
    new = {key: value * 1.5 for key, value in state.items()}
    for assign in (False, True):
        other = mixtures(**KINDS[kind])
        assert not other.load_state_dict(copy.deepcopy(new), strict=True, assign=assign).missing_keys
        for key, value in other.state_dict().items():
            assert relative_error(value, new[key]) < (0.01 if kind == "frozen" else 1e-9)
        assert all(isinstance(p, HaloWeight) == ("router" not in n) for n, p in other.named_parameters())
        expected = mixtures(**KINDS[kind])
        with torch.no_grad():
            for p, value in zip(expected.parameters(), new.values(), strict=True):
                p.copy_(value)
        assert torch.equal(other(x), expected(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({k: v[:2] for k, v in new.items()})


# Checkpointing, compilation, and weights without codes.


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "keep_products"])
@pytest.mark.parametrize("kind", ["trained", "no codes"])
def test_activation_checkpointing(x, kind, how, monkeypatch):
    monkeypatch.setattr(checkpointing, "SHORTEST_CONTRACTION", 32)
    model = mixtures(**KINDS[kind])
    expected = results(model, x)
    options = {"context_fn": keep_products} if how == "keep_products" else {}
    given = x.clone().requires_grad_()
    with OpLog() as log:
        y = checkpoint(model, given, use_reentrant=how == "reentrant", **options)
        y.sum().backward()
    assert all(map(torch.equal, [y, given.grad, *(p.grad for p in model.parameters())], expected))
    recomputed = 0 if how == "keep_products" else 4
    assert counts(log, "grouped_mm", "grouped_grad") == [8 + recomputed, 4]


def make_boxed(gm, inputs):
    return make_boxed_func(gm)


#: Inductor's passes and partitioner, without its code, which takes long to compile.
PARTITIONED = aot_autograd(fw_compiler=make_boxed, bw_compiler=make_boxed, partition_fn=partition_fn)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(x, kind):
    """The numbers of eager code, after a write to a state dict too."""
    torch._dynamo.reset()
    model = mixtures(**KINDS[kind])
    compiled = torch.compile(model, fullgraph=True, backend=PARTITIONED)
    for _ in range(2):
        for a, b in zip(results(compiled, x), results(model, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        for value in model.state_dict().values():
            value.mul_(1.25)


class Both(nn.Module):
    """Experts with a routing that is known."""

    def __init__(self, **options):
        super().__init__()
        self.layer = mixtures(layers=1, **options)[0]
        self.index = torch.tensor([[0, 1], [2, 3]]).repeat(16, 1)
        self.weights = torch.full((32, 2), 0.5)

    def forward(self, x):
        return experts(x, self.index, self.weights, self.layer.gate_up, self.layer.down)


def test_graph(x):
    """Each weight is read as its codes, X is quantised once, and nothing is quantised that is held."""
    torch._dynamo.reset()
    ops = [line.strip() for line in graphs(Both(), x.requires_grad_()).splitlines()]
    ours = [op.removeprefix("halo.") for op in ops if op.startswith("halo.") or op.endswith(":")]
    assert_expected_inline(
        "\n".join(ours),
        """\
forward:
group_tiles
rotate_quantize(left=[], right=[64, 0], int8, row)
gather_codes
grouped_mm
quantize_gated
grouped_mm
combine
backward:
quantize_groups_t
turn_codes
grouped_grad
quantize_groups
grouped_mm
quantize_gated_grad
grouped_mm
combine
quantize_groups_t
turn_codes
grouped_grad""",
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_without_codes_save_none(x, compiled):
    """Backward quantises them again."""
    saved = {}
    for kind in ("trained", "no codes"):
        torch._dynamo.reset()
        model, sizes = Both(**KINDS[kind]), []
        f = torch.compile(model, backend=PARTITIONED) if compiled else model
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t) or t, lambda t: t),
            OpLog() as log,
        ):
            y = f(x.clone().requires_grad_())
            y.sum().backward()
        saved[kind] = sum(t.numel() for t in sizes if t.element_size() == 1 and t.ndim == 2 and len(t) > 64)
        if not compiled:
            assert counts(log, "rotate_quantize") == [1 if kind == "trained" else 1 + 2 * 2]
    assert saved["no codes"] == 0 and saved["trained"] >= 4 * 64 * 48


# Experts without tokens, and errors.


@settings(max_examples=25)
@given(st.lists(st.sampled_from([0, 0, 1, 5, 130]), min_size=1, max_size=6), st.sampled_from(FORMATS), st.integers(0, 2))
def test_an_expert_without_tokens_has_a_zero_gradient(sizes, format, level):
    """Exactly, and after a step of SGD it has not moved; the others have."""
    weight = nn.Parameter(HaloWeight.from_hp(torch.randn(len(sizes), 16, 32), halo(level, format)))
    before, codes = weight.master.clone(), weight.codes.float().clone()
    offs = torch.tensor(sizes).cumsum(0).to(torch.int32)
    grouped_linear(torch.randn(sum(sizes), 32), weight, offs).square().sum().backward()
    torch.optim.SGD([weight], lr=0.1).step()
    for expert, size in enumerate(sizes):
        there = size > 0
        assert bool(weight.grad[expert].any()) == there
        assert torch.equal(weight.master[expert], before[expert]) != there
        rows = slice(16 * expert, 16 * expert + 16)
        assert there or torch.equal(weight.codes.float()[rows], codes[rows])


def test_a_nonfinite_value_is_found(x):
    model = mixtures()
    with torch.no_grad():
        model[1].down[2, 3] = torch.nan
    with find_nonfinite(model) as found:
        model(x).sum().backward()
    assert (found.first.layer, found.first.module, found.first.operand, found.first.nan) == ("1", "Mixture", "down", 48)
    with find_nonfinite(mixtures()) as found:
        mixtures()(x).sum().backward()
    assert not found
    with torch.no_grad():
        model[1].down.copy_(torch.zeros_like(model[1].down.master))
        model[0].gate_up.mul_(1e38)
    with pytest.raises(NonFiniteError) as error, find_nonfinite(model, stop=True):
        model(x)
    assert error.value.finding.layer == "0" and error.value.finding.product == "output" and error.value.finding.made_here


def test_errors_name_what_does_not_fit(x):
    weight = mixtures(layers=1)[0].gate_up
    offs = torch.tensor([8, 16, 24, 32], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"a product with a part, \[2, 96, 64\], of a converted weight is not supported"):
        grouped_linear(x[:16], weight.chunk(2)[0], offs[:2])
    with pytest.raises(ValueError, match=r"a plain weight \[4, 96, 64\] has no recipe: pass recipe="):
        grouped_linear(x, weight.master, offs)
    with pytest.warns(UserWarning, match=r"aten.bmm.* with a view .* of a converted weight \[4, 96, 64\] runs in high"):
        torch.bmm(x.view(4, 8, 64), weight.transpose(1, 2))
