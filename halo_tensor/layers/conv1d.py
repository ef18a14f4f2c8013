"""transformers' ``Conv1D``, GPT-2's linear layer with a transposed weight, by a recipe.

Imports transformers; :mod:`halo_tensor.layers.kinds` imports this module when it meets such a layer.
"""

import torch
from transformers.pytorch_utils import Conv1D

from halo_tensor.products.linear import linear
from halo_tensor.recipe import Recipe


class HaloConv1D(Conv1D):
    """A ``Conv1D`` that follows ``recipe``. Its weight stays a plain parameter [in, out], as optimisers, state dicts and PEFT
    know it; a recipe that quantises it in ``output`` does so in every forward."""

    recipe: Recipe

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight.t(), self.bias, self.recipe)
