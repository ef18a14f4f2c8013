"""Products with a converted weight, and with what was computed from one, that are not quantised: each warns, nothing else does."""

import copy
import io
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from halo_tensor import HaloWeight, dequantize_, halo_config, hot_config, quantize_
from halo_tensor.fences.fast_paths import DERIVED
from tests.helpers.recording import OpLog

X = torch.randn(4, 128, generator=torch.Generator().manual_seed(3))


def layer(out: int = 256, frozen: bool = False) -> nn.Linear:
    torch.manual_seed(1)
    made = nn.Linear(128, out).requires_grad_(not frozen)
    quantize_(made, halo_config(1, "int8"))
    return made


PRODUCTS = {
    "mm": lambda w: torch.mm(X, w.t()),
    "mm out": lambda w: torch.mm(X, w.detach().t(), out=torch.zeros(4, 256)),
    "addmm_": lambda w: torch.zeros(4, 256).addmm_(X, w.t()),
    "mv": lambda w: torch.mv(w, X[0]),
    "addmv": lambda w: torch.addmv(torch.zeros(256), w, X[0]),
    "baddbmm": lambda w: torch.baddbmm(torch.zeros(1, 4, 256), X[None], w.t()[None]),
    "addbmm": lambda w: torch.addbmm(torch.zeros(4, 256), X[None], w.t()[None]),
    "einsum": lambda w: torch.einsum("bi,oi->bo", X, w),
    "matmul with batches": lambda w: X.expand(2, 4, 128) @ w.t(),
    "tensordot": lambda w: torch.tensordot(X, w, dims=([1], [1])),
    "inner": lambda w: torch.inner(X, w),
    "bilinear": lambda w: F.bilinear(X, X, w.view(2, 128, 128)),
    "conv1d": lambda w: F.conv1d(X.t()[None], w[:, :, None]),
    "conv2d": lambda w: F.conv2d(X[:, :, None, None], w[:, :, None, None]),
    "grouped_mm": lambda w: torch._grouped_mm(X.bfloat16()[None], w.bfloat16().t()[None]),
    "of a chunk": lambda w: F.linear(X, w.chunk(4)[1]),
    "of a chunk of columns": lambda w: F.linear(X[:, :64], w.chunk(2, 1)[1]),
    "of a chunk's transpose": lambda w: X @ w.chunk(4)[1].T,
    "of w * 0.5": lambda w: F.linear(X, w * 0.5),
    "of w.T * 0.5": lambda w: X @ (w.T * 0.5),
    "of a mask": lambda w: F.linear(X, torch.where(w > 0, w, 0)),
    "of w + BA": lambda w: F.linear(X, w + torch.ones(256, 2, requires_grad=True) @ torch.ones(2, 128)),
    "of cat": lambda w: F.linear(X, torch.cat([w, w])),
    "of stack": lambda w: torch.bmm(X.expand(2, 4, 128), torch.stack([w, w]).mT),
    "of pad": lambda w: F.linear(F.pad(X, (0, 8)), F.pad(w, (0, 8))),
    "of index_select": lambda w: F.linear(X, w.index_select(0, torch.arange(8))),
    "of rows": lambda w: F.linear(X, w[torch.arange(8)]),
    "of a view of w * 0.5": lambda w: X @ (w * 0.5).T[:, :32],
    "of a chain": lambda w: torch.einsum("bi,oi->bo", X, (torch.cat([w, w]) * 2).tanh()),
    "of a cell": lambda w: torch._VF.gru_cell(X, X, torch.cat([w, w[:128]]), torch.cat([w, w[:128]])),
    "with w * 0.5 left": lambda w: (w * 0.5).mv(X[0]),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_in_high_precision_warns_once_and_is_right(name, frozen):
    weight = layer(frozen=frozen).weight
    plain = weight.dequantize().detach().clone().requires_grad_(not frozen)

    def forward_and_backward():
        y = PRODUCTS[name](weight)
        if y.requires_grad:
            y.square().sum().backward()
        return y

    with pytest.warns(UserWarning, match=r"runs in high precision, since it is not called as F.linear\(x, weight\)") as caught:
        y = forward_and_backward()
    assert len({str(w.message) for w in caught}) == 1 and "converted weight [256, 128]" in str(caught[0].message)
    expected = PRODUCTS[name](plain)
    torch.testing.assert_close(y.detach(), expected.detach())
    assert type(y) is torch.Tensor
    if expected.requires_grad and not frozen:
        torch.testing.assert_close(weight.grad, torch.autograd.grad(expected.square().sum(), plain)[0])


def test_the_warning_names_the_line_of_the_caller():
    weight = layer().weight
    with pytest.warns(UserWarning, match="value .512, 128. computed from a converted weight") as caught:
        F.linear(X, torch.cat([weight, weight]))
    assert caught[0].filename == __file__


QUIET = {
    "a product by the recipe": lambda m: m(X).sum().backward(),
    "functional, with parameters": lambda m: torch.func.functional_call(m, dict(m.named_parameters()), X),
    "a penalty": lambda m: sum((p * 1.5).pow(2).sum() + p.abs().sum() + p.norm() for p in m.parameters()).backward(),
    "a norm of rows that scales activations": lambda m: F.linear(
        m(X) * m.weight.norm(dim=1) * (m.weight * 2).norm(dim=1, keepdim=True).T, torch.ones(256, 256)
    ),
    "a gradient penalty": lambda m: torch.autograd.grad(m(X).sum(), list(m.parameters()))[0].norm(),
    "clipping": lambda m: (m(X).sum().backward(), nn.utils.clip_grad_norm_(m.parameters(), 1.0)),
    "products of gradients, as of Muon": lambda m: (m(X).sum().backward(), m.weight.grad @ m.weight.grad.T),
    "products of an optimiser's state": lambda m: torch.zeros_like(m.weight).T @ torch.ones_like(m.weight),
    "vectors": lambda m: nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(m.parameters()) * 2, m.parameters()),
    "an embedding": lambda m: F.linear(F.embedding(torch.tensor([[1, 2], [3, 4]]), m.weight), torch.ones(8, 128)),
    "an embedding by index": lambda m: F.linear(m.weight[torch.tensor([[1, 2], [3, 4]])] * 2, torch.ones(8, 128)),
    "an average": lambda m: [(0.9 * p.data + 0.1 * p.detach()) @ torch.ones(128) for p in m.parameters() if p.ndim == 2],
    "no gradients": lambda m: torch.no_grad()(lambda: F.linear(X, m.weight.dequantize() * 2))(),
    "a singular value": lambda m: torch.linalg.matrix_norm(m.weight, 2).backward(),
}


@pytest.mark.parametrize("name", QUIET)
def test_what_is_no_product_with_a_weight_does_not_warn(name):
    model = layer()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        QUIET[name](model)


@pytest.mark.parametrize("no_grad", [False, True])
def test_a_value_computed_from_a_weight_is_a_tensor_to_everything(no_grad):
    weight = layer().weight
    value = weight * 0.5
    dense = weight.dequantize() * 0.5
    with torch.set_grad_enabled(not no_grad):
        parameters = nn.Parameter(value), nn.Parameter(torch.cat([value, weight])[:256], requires_grad=False)
    assert all(type(p) is nn.Parameter and p.is_leaf for p in parameters) and not vars(parameters[0])
    assert torch.equal(parameters[0], dense)
    torch.save({"a": value, "b": value.detach()}, buffer := io.BytesIO())
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert {type(t) for t in loaded.values()} == {torch.Tensor} and torch.equal(loaded["a"], dense)
    copied = copy.deepcopy(value.detach())
    assert type(copied) is torch.Tensor and torch.equal(copied, dense)
    assert (value.detach().numpy() == dense.detach().numpy()).all()
    target = nn.Linear(128, 256)
    target.weight.data = weight * 0.5
    assert torch.equal(target.weight, dense) and type(target.weight) is nn.Parameter
    target = layer()
    target.weight.data = weight * 0.5
    assert isinstance(target.weight, HaloWeight) and torch.equal(target.weight.dequantize(), dense)


# The same in compiled code.

DERIVED_PRODUCTS = [
    *("of w * 0.5", "of w.T * 0.5", "of a mask", "of cat", "of stack", "of pad", "of index_select", "of rows"),
    *("of a view of w * 0.5", "of a chain", "of a cell", "with w * 0.5 left"),
]


@contextmanager
def messages():
    """The warnings of this library: yields a list of (what they say, file, line)."""
    torch._dynamo.reset()
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    ours = [w for w in caught if "halo_tensor" in str(w.message) or "converted weight" in str(w.message)]
    found += [(str(w.message), w.filename, w.lineno) for w in ours]


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


@pytest.mark.parametrize(
    ("frozen", "backend", "name"),
    [
        *((False, "aot_eager", name) for name in DERIVED_PRODUCTS),
        *((True, "aot_eager", name) for name in ("of w.T * 0.5", "of stack")),
        *((frozen, "inductor", "of cat") for frozen in (False, True)),
    ],
)
def test_a_compiled_product_warns_as_an_eager_one_does(frozen, backend, name):
    model = layer(frozen=frozen)
    with messages() as eager:
        expected = PRODUCTS[name](model.weight)
    with messages() as found:
        y = compiled(lambda model: PRODUCTS[name](model.weight), backend)(model)
    torch.testing.assert_close(y, expected)
    # Functions have names with underscores, and einsum a line of its own, only in eager code.
    said = [text.split(" with ", 1)[1] for text, *_ in eager]
    assert len(said) == 1 and [text.split(" with ", 1)[1] for text, *_ in found] == said
    assert found[0][1:] == (__file__, PRODUCTS[name].__code__.co_firstlineno)


@pytest.mark.parametrize("name", ["of a chunk", "of a chunk of columns", "of a chunk's transpose"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_compiled_product_of_a_chunk_is_that_of_a_view(name, frozen):
    model = layer(frozen=frozen)
    with messages() as eager:
        expected = PRODUCTS[name](model.weight)
    with messages() as found:
        y = compiled(lambda model: PRODUCTS[name](model.weight), "aot_eager")(model)
    torch.testing.assert_close(y, expected)
    assert len(eager) == 1 and len(found) >= 1 and all("runs in high precision" in text for text, *_ in found)


def in_another_mode(model):
    with torch.no_grad():
        y = F.linear(X, model.weight * 2)
        with torch.enable_grad():
            y = y + F.linear(X, model.weight * 3)
    with torch.inference_mode():
        F.linear(X, model.weight * 4)
    return y


B, A = torch.ones(256, 2, requires_grad=True), torch.ones(2, 128)


def around_a_checkpoint(model):
    value = model.weight * 0.5
    return checkpoint(lambda x: F.linear(x, value), X, use_reentrant=False)


COMPILED_PRODUCTS = {
    "of w + BA": lambda m: F.linear(X, m.weight + B @ A),
    "in a loop": lambda m: [F.linear(X, m.weight * 2) for _ in range(3)],
    "of one of several results": lambda m: F.linear(X, (m.weight * 2).split(64)[1]),
    "of a value written in place": lambda m: F.linear(X, (m.weight * 2).mul_(3)),
    "of a detached value": lambda m: F.linear(X, (m.weight * 2).detach()),
    "in a checkpoint": lambda m: checkpoint(lambda x: F.linear(x, m.weight * 0.5), X, use_reentrant=False),
    "around a checkpoint": around_a_checkpoint,
    "beside a layer's own": lambda m: (m(X), F.linear(X, m.weight * 2)),
    "with gradients in part": in_another_mode,
}


@pytest.mark.parametrize("name", COMPILED_PRODUCTS)
def test_a_product_anywhere_in_a_compiled_graph_warns_once(name):
    with messages() as found:
        compiled(COMPILED_PRODUCTS[name])(layer())
    assert len(found) == 1 and "linear with a value" in found[0][0] and "runs in high precision" in found[0][0]


def test_a_graph_of_dynamic_sizes_warns():
    with messages() as found:
        compiled(lambda m, x: F.linear(x, m.weight * 2), dynamic=True)(layer(), X)
    assert len(found) == 1 and "runs in high precision" in found[0][0]


def test_the_search_makes_no_graph_depend_on_sizes():
    model, rows = layer(), torch.zeros(256, dtype=torch.long)
    run = compiled(lambda m, x: x.index_add(0, rows, m.weight), dynamic=True)
    with messages() as found, torch._dynamo.config.patch(error_on_recompile=True):
        for count in (4, 256):  # the rows of the weight
            run(model, torch.ones(count, 128))
    assert not found


def test_a_frame_with_a_graph_break_warns():
    def forward(m):
        y = F.linear(X, m.weight * 2)
        torch._dynamo.graph_break()
        return y + F.linear(X, m.weight * 2)

    with messages() as found:
        torch.compile(forward, backend="aot_eager")(layer())
    assert len(found) == 2 and found[0][0] == found[1][0] and found[0][2] == found[1][2] - 2


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_code_takes_a_value_computed_from_a_weight(backend):
    weight = layer().weight
    value = weight * 0.5
    with messages() as found:
        y = compiled(F.linear, backend)(X, value)
    torch.testing.assert_close(y, X @ (weight.dequantize() * 0.5).T)
    # In torch 2.11 the "eager" backend runs the product as eager code, which warns too.
    most = 2 if backend == "eager" and torch.__version__.startswith("2.11.") else 1
    assert 1 <= len(found) <= most
    assert all("a value [256, 128] computed from a converted weight" in message for message, *_ in found)


def written(buffer, m):
    buffer += m.weight.detach()
    buffer.lerp_(m.weight, 0.5)
    return buffer @ torch.ones(128, 2)


def square() -> nn.Linear:
    model = nn.Linear(128, 128)
    quantize_(model, halo_config(1, "int8"))
    return model


def identity_recipe() -> nn.Linear:
    model = nn.Linear(128, 128)
    quantize_(model, halo_config(1, "bf16"))
    return model


SQUARE = torch.randn(128, 128, requires_grad=True, generator=torch.Generator().manual_seed(3))
COMPILED_QUIET = {
    "layers": lambda m: m(m(SQUARE)) @ m(SQUARE).T,
    "a checkpointed layer of a square X": lambda m: checkpoint(m, SQUARE, use_reentrant=False) @ torch.ones(128, 2),
    "a penalty": lambda m: (m.weight * 1.5).pow(2).sum() + m.weight.abs().sum() + m.weight.norm(),
    "norms of rows": lambda m: F.linear(m(SQUARE) * m.weight.norm(dim=1) * (m.weight * 2).norm(dim=1), torch.ones(2, 128)),
    "a value as X": lambda m: F.linear(m.weight * 2, m.weight),
    "an embedding that is tied": lambda m: F.linear(F.embedding(torch.tensor([1, 2]), m.weight), m.weight),
    "a low-rank adapter": lambda m: m(SQUARE) + SQUARE @ torch.ones(128, 2) @ torch.ones(2, 128),
    "an average": lambda m: written(torch.zeros(128, 128), m),
    "a dequantised weight": lambda m: F.linear(SQUARE, m.weight.dequantize() * 2),
    "no gradients": torch.no_grad()(lambda m: F.linear(SQUARE, m.weight * 2)),
}


@pytest.mark.parametrize("name", COMPILED_QUIET)
def test_what_is_no_product_with_a_weight_does_not_warn_in_compiled_code(name):
    with messages() as found:
        y = compiled(COMPILED_QUIET[name])(square())
        if y.requires_grad:
            y.sum().backward()
    assert not found


def test_a_graph_that_inductor_takes_is_quiet_without_such_products():
    model = square()
    with messages() as found:
        compiled(lambda m: m(SQUARE).sum() + (m.weight * 2).pow(2).sum(), "inductor")(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        compiled(torch.no_grad()(lambda m: F.linear(SQUARE, m.weight * 2)), "inductor")(model)
    assert not found


def test_a_recipe_that_quantises_nothing_does_not_warn_in_compiled_code():
    with messages() as found:
        compiled(lambda m: F.linear(SQUARE, m.weight * 2))(identity_recipe())
    assert not found


@pytest.mark.parametrize("kind", ["foreach", "fused", "muon"])
def test_a_compiled_optimiser_does_not_warn(kind):
    model = layer()
    model(X).square().sum().backward()
    optimizer = torch.optim.Muon([model.weight]) if kind == "muon" else torch.optim.AdamW(model.parameters(), **{kind: True})
    before = model.weight.dequantize().clone()
    with messages() as found:
        torch.compile(optimizer.step, backend="aot_eager")()
    assert not found and not torch.equal(model.weight.dequantize(), before)


@pytest.mark.parametrize("broken", ["derived_graph._products", "derived_graph.install", "is_compiled"])
def test_a_search_that_fails_says_so_once_and_compiling_goes_on(broken, monkeypatch):
    def fail(*args):
        raise AttributeError("no such thing")

    monkeypatch.setattr(DERIVED, "failure", None)
    monkeypatch.setattr(f"halo_tensor.weight.{broken}", fail)
    model = layer()
    with messages() as found:
        y = compiled(lambda m: F.linear(X, m.weight * 2))(model)
    torch.testing.assert_close(y, X @ (model.weight.dequantize() * 2).T)
    assert len(found) == 1 and "'derived'" in found[0][0] and "AttributeError: no such thing" in found[0][0]


def test_the_search_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(DERIVED, "disabled", True)
    with messages() as found:
        compiled(lambda m: F.linear(X, m.weight * 2))(layer())
    assert not found


# Layers whose weight has become plain.


def parametrised(model):
    nn.utils.parametrizations.weight_norm(model)
    return model(X)


def replaced(model):
    model.weight = nn.Parameter(torch.zeros(256, 128))
    return model(X)


@pytest.mark.parametrize(
    "call",
    [lambda model: torch.func.functional_call(model, model.state_dict(), X), parametrised, replaced],
    ids=["functional", "parametrised", "replaced"],
)
def test_a_converted_layer_without_its_weight_warns(call):
    with (
        pytest.warns(UserWarning, match=r"converted layer \[256, 128\] runs in high precision, since its weight was replaced"),
        OpLog() as log,
    ):
        call(layer())
    assert not log.products()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with OpLog() as log:
            layer()(X)
        assert len(log.products()) == 1
        plain = layer()
        dequantize_(plain)
        call(plain)
    assert not plain._forward_pre_hooks


@pytest.mark.parametrize("to_script", [torch.jit.script, lambda model: torch.jit.trace(model, X)], ids=["script", "trace"])
def test_torchscript_is_refused(to_script):
    model = nn.Sequential(layer())
    with pytest.raises(
        RuntimeError, match=r"torch.jit.(script|trace) knows no converted layers: call dequantize_\(model\) first"
    ):
        to_script(model)
    dequantize_(model)
    assert torch.equal(to_script(model)(X), model(X))


def test_a_traced_convolution_is_refused():
    model = nn.Sequential(nn.Conv2d(128, 128, 1))
    quantize_(model, hot_config())
    with pytest.raises(RuntimeError, match=r"torch.jit.trace knows no converted layers: call dequantize_\(model\) first"):
        torch.jit.trace(model, torch.randn(1, 128, 4, 4))
