"""A small model, and functions that train it."""

import torch
from torch import nn

from halo_tensor import halo_config, quantize_


class Mlp(nn.Module):
    def __init__(self, width: int = 128):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.nn.functional.silu(self.up(self.norm(x))))


def make(converted: bool = True, blocks: int = 2) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(*(Mlp() for _ in range(blocks)))
    if converted:
        quantize_(model, halo_config(1, "int8"))
    return model


def train(model, steps=5, optimizer=None, **kwargs):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3, **kwargs)
    x, target = torch.randn(2, steps, 32, 128, generator=torch.Generator().manual_seed(2))
    losses = []
    for i in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x[i]), target[i])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {}),
    "adamw_fused": (torch.optim.AdamW, {"fused": True}),
    "adamw_foreach": (torch.optim.AdamW, {"foreach": True}),
    "adam": (torch.optim.Adam, {}),
    "adamax": (torch.optim.Adamax, {}),
    "adadelta": (torch.optim.Adadelta, {}),
    "adagrad": (torch.optim.Adagrad, {}),
    "adafactor": (torch.optim.Adafactor, {}),
    "asgd": (torch.optim.ASGD, {}),
    "nadam": (torch.optim.NAdam, {}),
    "radam": (torch.optim.RAdam, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "rprop": (torch.optim.Rprop, {}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "sgd_fused": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    "sgd_foreach": (torch.optim.SGD, {"momentum": 0.9, "foreach": True}),
}


def step_alike(name: str, plain: nn.Module, model: nn.Module) -> torch.optim.Optimizer:
    """Take three steps of both models with the same gradients. Return the optimiser of ``model``."""
    kind, options = OPTIMIZERS[name]
    optimizers = [kind(m.parameters(), lr=1e-2, **options) for m in (plain, model)]
    for step in range(3):
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    return optimizers[1]
