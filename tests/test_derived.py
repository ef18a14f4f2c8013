"""Products with a converted weight, and with what was computed from one, that are not quantised: each warns, nothing else does."""

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from halo_tensor import HaloWeight, dequantize_, halo_config, hot_config, quantize_
from tests.util import OpLog

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


def test_compiled_code_takes_a_value_computed_from_a_weight():
    weight = layer().weight
    y = torch.compile(F.linear, fullgraph=True, backend="eager")(X, weight * 0.5)
    torch.testing.assert_close(y, X @ (weight.dequantize() * 0.5).T)


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
