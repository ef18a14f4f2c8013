"""A small mixture whose experts are held in parameters of three dimensions."""

import torch
from torch import nn

from halo_tensor import HaloWeight
from halo_tensor.layers.hooks import update_hooks
from halo_tensor.products.experts import experts
from halo_tensor.recipe import INT8, Recipe, halo
from tests.helpers.expert_layers import exact_experts

INT8_HALO_1 = halo(1, INT8)


class Mixture(nn.Module):
    """x + the sum of a token's experts, which a router chooses."""

    def __init__(self, count: int, d: int, f: int, top_k: int):
        super().__init__()
        self.top_k, self.router = top_k, nn.Linear(d, count, bias=False)
        self.gate_up = nn.Parameter(torch.randn(count, 2 * f, d) * d**-0.5)
        self.down = nn.Parameter(torch.randn(count, d, f) * f**-0.5)

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        weights, index = self.router(tokens).softmax(1).topk(self.top_k)
        f = exact_experts if type(self.down) is nn.Parameter else experts
        return x + f(tokens, index, weights, self.gate_up, self.down).view(x.shape)


def convert(
    model: nn.Module,
    recipe: Recipe = INT8_HALO_1,
    frozen: bool = False,
    keep_codes: bool = True,
    in_features_first: bool = False,
) -> nn.Module:
    """Convert the experts of all mixtures in a model."""
    for module in model.modules():
        if isinstance(module, Mixture):
            for name in ("gate_up", "down"):
                dense = getattr(module, name)
                master = dense.detach().transpose(1, 2).contiguous() if in_features_first else dense.detach()
                weight = HaloWeight.from_hp(
                    master, recipe, frozen=frozen, keep_codes=keep_codes, in_features_first=in_features_first
                )
                setattr(module, name, nn.Parameter(weight, requires_grad=dense.requires_grad and not frozen))
            update_hooks(module)
    return model


def mixtures(
    recipe: Recipe | None = INT8_HALO_1, layers: int = 2, count: int = 4, d: int = 64, f: int = 48, **options
) -> nn.Module:
    """Return a model of ``layers`` mixtures; in high precision if ``recipe`` is None."""
    torch.manual_seed(1)
    model = nn.Sequential(*[Mixture(count, d, f, 2) for _ in range(layers)])
    return model if recipe is None else convert(model, recipe, **options)
