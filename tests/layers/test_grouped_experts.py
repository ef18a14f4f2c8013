"""torchtitan's experts: converted by quantize_, run, compiled, saved and restored."""

import copy
from types import SimpleNamespace

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd

pytest.importorskip("torchtitan", reason="torchtitan is not installed")
pytest.importorskip("torchtitan.models.common.moe", reason="torchtitan cannot be imported")
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts

from halo_tensor import HaloWeight, dequantize_, halo_config, hot_config, quantize_
from tests.helpers.errors import relative_error
from tests.helpers.expert_layers import GPT_OSS, activate64
from tests.helpers.recording import OpLog

INT8 = halo_config(1, "int8", min_features=16)
COUNTS = torch.tensor([10, 0, 20, 8])  # rows of each expert: one has none, and two rows belong to none
KINDS = pytest.mark.parametrize("kind", [GroupedExperts, GptOssGroupedExperts])


def experts(kind, dtype=torch.float32, seed=0) -> nn.Sequential:
    torch.manual_seed(seed)
    made = kind(kind.Config(dim=64, hidden_dim=96, num_experts=4))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return nn.Sequential(made.to(dtype))


def rows(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(40, 64).to(dtype), torch.randn(40, 64).to(dtype)


def exact_run(module, x, e):
    """Output and gradients in float64, by a loop over experts."""
    p = {name: value.detach().double().requires_grad_() for name, value in module.named_parameters()}
    x, parts, start = x.double().requires_grad_(), [], 0
    for i, count in enumerate(COUNTS.tolist()):
        row, start = x[start : start + count], start + count
        if isinstance(module, GptOssGroupedExperts):
            h = activate64(row @ p["mlp1_weight_EGD"][i].t() + p["mlp1_bias_EG"][i], GPT_OSS)
            parts.append(h @ p["mlp2_weight_EDF"][i].t() + p["mlp2_bias_ED"][i])
        else:
            h = nn.functional.silu(row @ p["w1_EFD"][i].t()) * (row @ p["w3_EFD"][i].t())
            parts.append(h @ p["w2_EDF"][i].t())
    y = torch.cat(parts)
    gradients = torch.autograd.grad(y, [x, *p.values()], e[: y.shape[0]].double())
    return y, dict(zip(("x", *p), gradients, strict=True))


def run(module, x, e):
    x = x.clone().requires_grad_()
    y = module(x, COUNTS)
    names, parameters = zip(*module.named_parameters(), strict=True)
    return y, dict(zip(("x", *names), torch.autograd.grad(y, [x, *parameters], e), strict=True))


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_within_a_window(kind, dtype):
    """int8 products run in float32 models too, whose weights torchtitan's own forward would cast to plain ones."""
    model = experts(kind, dtype)
    exact = exact_run(model[0], *rows(dtype))
    conversion = quantize_(model, INT8)
    assert conversion.converted == ["0"] and conversion.share == 1
    with OpLog() as log:
        y, gradients = run(model[0], *rows(dtype))
    names = [name for name, _ in log.calls]
    products = 3 if kind is GroupedExperts else 2
    assert names.count("grouped_mm") == 2 * products and names.count("grouped_grad") == products
    assert all(codes == torch.int8 for name, codes in log.calls if name == "grouped_mm")
    assert y.dtype == dtype and not y[38:].any() and not gradients["x"][38:].any()
    assert 0.005 < relative_error(y[:38], exact[0]) < 0.03
    for name, gradient in gradients.items():
        error = relative_error(gradient, exact[1][name])
        assert gradient.dtype == dtype and 0.001 < error < 0.04, (name, error)
        assert name == "x" or not gradient[1].any(), name


@KINDS
def test_compiled_code_gives_the_same(kind):
    """With Inductor's partition, in which products with the same X share its codes."""
    model, graphs = experts(kind), []
    quantize_(model, INT8)
    expected, expected_gradients = run(model[0], *rows())

    def keep(graph, inputs):
        graphs.append([node.target._opname for node in graph.graph.nodes if getattr(node.target, "namespace", "") == "halo"])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    compiled = torch.compile(model[0], backend=backend, fullgraph=True)
    x = rows()[0].requires_grad_()
    y = compiled(x, COUNTS)
    y.backward(rows()[1])
    assert torch.equal(y, expected) and torch.equal(x.grad, expected_gradients["x"])
    for name, parameter in model[0].named_parameters():
        assert torch.equal(parameter.grad, expected_gradients[name]), name
    forward, backward = graphs
    if kind is GroupedExperts:
        assert forward.count("rotate_quantize") == 2 and forward.count("grouped_mm") == 3 == backward.count("grouped_grad")
    else:
        assert forward.count("rotate_quantize") == 1 == forward.count("quantize_gated")


@KINDS
def test_a_state_dict_is_plain_and_copies_and_restored_experts_work(kind):
    model = experts(kind)
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        before = model[0](rows()[0], COUNTS)[:38]
        quantize_(model, INT8)
        assert "4 experts, 64→" in repr(model) and "halo(level=1, int8, block 128), codes kept" in repr(model)
        converted = model[0](rows()[0], COUNTS)
        state = model.state_dict()
        assert all(type(value) is torch.Tensor and torch.equal(value, plain[name]) for name, value in state.items())
        assert torch.equal(copy.deepcopy(model)[0](rows()[0], COUNTS), converted)
        other = experts(kind, seed=3)
        quantize_(other, INT8)
        other.load_state_dict(state)
        assert torch.equal(other[0](rows()[0], COUNTS), converted)
        dequantize_(model)
        assert type(model[0]) is kind and not any(isinstance(p, HaloWeight) for p in model.parameters())
        assert torch.equal(model[0](rows()[0], COUNTS)[:38], before)


def test_an_optimizer_brings_codes_up_to_date():
    model = experts(GroupedExperts)
    quantize_(model, INT8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = (model[0](*rows()[:1], COUNTS) - rows()[1])[:38].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0] - 0.1
    fresh = experts(GroupedExperts, seed=3)
    dequantize_(model)
    fresh.load_state_dict(model.state_dict())
    quantize_(fresh, INT8)
    quantize_(model, INT8)
    with torch.no_grad():
        assert torch.equal(fresh[0](rows()[0], COUNTS), model[0](rows()[0], COUNTS))


def test_frozen_experts_hold_codes_only():
    model = experts(GroupedExperts).requires_grad_(False)
    quantize_(model, INT8)
    assert model[0].w2_EDF.master is None and "frozen, codes only" in repr(model)
    x = rows()[0].requires_grad_()
    model[0](x, COUNTS).sum().backward()
    assert x.grad[:38].any(1).all()


class _Own(GroupedExperts):
    def _grouped_mm(self, *, A, B_t, offs):
        return super()._grouped_mm(A=A, B_t=B_t, offs=offs)


def test_what_cannot_follow_is_named():
    own = nn.Sequential(_Own(GroupedExperts.Config(dim=64, hidden_dim=96, num_experts=4)))
    with pytest.raises(ValueError, match="it is a _Own, whose forward may be its own"):
        quantize_(own, INT8)
    with pytest.raises(ValueError, match="experts cannot follow this recipe"):
        quantize_(experts(GroupedExperts), hot_config(min_features=16))
    wide = nn.Sequential(GroupedExperts(GroupedExperts.Config(dim=64, hidden_dim=100, num_experts=4)))
    with pytest.raises(ValueError, match="must be multiples of 16; got 100 and 64"):
        quantize_(wide, INT8)


def test_experts_that_became_plain_warn():
    model = experts(GroupedExperts)
    quantize_(model, INT8)
    model[0].w2_EDF = nn.Parameter(torch.zeros(4, 64, 96))
    with pytest.warns(UserWarning, match="GroupedExperts runs in high precision, since a weight was replaced"):
        model[0](rows()[0], COUNTS)


@pytest.mark.parametrize(
    ("degrees", "option"),
    [
        ({"ep": 2}, "--parallelism.expert_parallel_degree 1"),
        ({"tp": 2}, "--parallelism.tensor_parallel_degree 1"),
        ({"spmd_backend": "full_dtensor"}, "--parallelism.spmd_backend default"),
    ],
)
def test_other_parallelism_is_refused(degrees, option):
    model = experts(GroupedExperts)
    quantize_(model, INT8)
    with pytest.raises(ValueError, match=f"GroupedExperts is sharded by FSDP2 only: set {option}, or leave"):
        model[0].parallelize(SimpleNamespace(**{"ep": 1, "tp": 1, "spmd_backend": "default"} | degrees))


def test_a_layer_of_a_mixture_is_converted_by_quantize_():
    """Experts and shared experts of DeepSeek's debug model; its router stays in high precision."""
    registry = pytest.importorskip("torchtitan.models.deepseek_v3")
    torch.manual_seed(0)
    moe = registry.model_registry("debugmodel").model.layers[1].moe.build()
    moe.init_states()
    conversion = quantize_(moe, halo_config(1, "int8"))
    assert conversion.converted == ["routed_experts.inner_experts", *(f"shared_experts.w{i}" for i in (1, 2, 3))]
    assert list(conversion.skipped) == ["router.gate"]
    with OpLog() as log:
        moe(torch.randn(2, 16, 256, requires_grad=True)).square().mean().backward()
    names = [name for name, _ in log.calls]
    assert names.count("grouped_grad") == 3 and names.count("scaled_mm") == 9
    assert moe.routed_experts.inner_experts.w1_EFD.grad.any() and moe.router.gate.weight.grad.any()
