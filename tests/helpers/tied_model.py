"""A model whose output layer may be tied to its embedding."""

import torch
from torch import nn


class Model(nn.Module):
    """Two blocks, an embedding, and an output layer that may be tied to it."""

    def __init__(self, tied: bool = True, width: int = 128):
        super().__init__()
        self.embed = nn.Embedding(512, width)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(width, 256), "down": nn.Linear(256, width)}) for _ in "ab")
        self.router = nn.Linear(width, 8)
        self.head = nn.Linear(width, 512, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["down"](torch.relu(block["up"](x)))
        return self.head(x) + self.router(x).sum()


BLOCKS = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
