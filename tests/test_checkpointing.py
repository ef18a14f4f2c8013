"""keep_products: what backward repeats, and what is saved."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from halo_tensor import halo_config, hot_config, keep_products, quantize_
from tests.helpers.errors import relative_error
from tests.helpers.recording import OpLog, saved_bytes

WIDTH, TOKENS = 512, 64
CONFIGS = [halo_config(1, "fp8"), halo_config(2, "int8"), hot_config(rounding="nearest")]
in_every_config = pytest.mark.parametrize("config", CONFIGS, ids=["halo1-fp8", "halo2-int8", "hot"])


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def make(config):
    model = Mlp()
    quantize_(model, config)
    return model, torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(TOKENS, WIDTH)


def kept(model):
    return lambda x: checkpoint(model, x, use_reentrant=False, context_fn=keep_products)


def gradients(f, model, x, e):
    return torch.autograd.grad(f(x), [x, *model.parameters()], e)


@pytest.mark.parametrize("backward", [torch.Tensor.backward, torch.autograd.backward])
def test_gradients_of_chosen_weights(backward):
    """Also where the loss is asked for them: what is computed again is what the recipe computes."""
    model, x, e = make(CONFIGS[1])
    expected = gradients(model, model, x, e)[1:]
    for chosen in ([*model.parameters()], [model.down.weight]):
        model.zero_grad()
        backward((checkpoint(model, x, use_reentrant=False) * e).sum(), inputs=chosen)
        for parameter, exact in zip(model.parameters(), expected, strict=True):
            assert torch.equal(parameter.grad, exact) if any(parameter is p for p in chosen) else parameter.grad is None


@in_every_config
def test_gradients_stay_and_products_are_not_repeated(config):
    model, x, e = make(config)
    logs = {}
    for name, f in {"plain": model, "kept": kept(model)}.items():
        with OpLog() as log:
            logs[name] = gradients(f, model, x, e), Counter(op for op, _ in log.calls)
    (plain, once), (repeated, again) = logs.values()
    assert all(torch.equal(a, b) for a, b in zip(plain, repeated, strict=True))
    assert again["scaled_mm"] == once["scaled_mm"] > 0 and again["rotate_quantize"] > once["rotate_quantize"]


@pytest.mark.parametrize("frozen", [False, True])
def test_compiled(frozen):
    """Saved are the input, what enters SiLU and what it is multiplied with; the result of ``down`` is nobody's operand."""
    torch._dynamo.reset()
    model = Mlp().requires_grad_(not frozen)
    quantize_(model, halo_config(1, "int8"))
    x, e = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(TOKENS, WIDTH)
    parameters = [] if frozen else list(model.parameters())
    f = torch.compile(kept(model), fullgraph=True)
    with torch._functorch.config.patch(enable_autograd_cache=False), saved_bytes() as saved:
        y = f(x)
    assert saved(model) <= 3.1 * TOKENS * WIDTH * 4
    expected = torch.autograd.grad(model(x), [x, *parameters], e)
    for a, b in zip(torch.autograd.grad(y, [x, *parameters], e), expected, strict=True):
        assert relative_error(a, b) < 1e-3  # the compiled norm rounds otherwise, which moves a few codes by one


@pytest.mark.parametrize("width", [511, 512])
def test_short_contractions_are_repeated(width):
    """The product of an adapter takes longer to write than to compute, so only longer ones are kept."""
    layer, x = nn.Linear(width, 8, bias=False), torch.randn(4, width, requires_grad=True)
    products = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            products[func] += 1
            return func(*args, **(kwargs or {}))

    with Count():
        y = checkpoint(lambda x: layer(x).exp().cos(), x, use_reentrant=False, context_fn=keep_products)
        y.sum().backward()
    assert products[torch.ops.aten.mm.default] == (3 if width >= 512 else 4)  # forward's, backward's two, and the repeated one
    assert products[torch.ops.aten.exp.default] == 2
