"""transformers' ``Conv1D``, GPT-2's linear layer with a transposed weight, that follows a recipe.

It imports transformers, so :mod:`halo_tensor.layers.kinds` imports this module only when it converts such a layer.
"""

import torch
from transformers.pytorch_utils import Conv1D

from halo_tensor.layers.printing import describe_recipe
from halo_tensor.products.linear import linear
from halo_tensor.recipe import Recipe


class HaloConv1D(Conv1D):
    """A ``Conv1D`` that follows ``recipe``.

    Its weight stays a plain parameter [in, out], since optimisers, state dicts and PEFT expect that. A recipe that quantises
    it in ``output`` does so in every forward.
    """

    recipe: Recipe

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x [..., in] with the weight: [..., out]."""
        return linear(x, self.weight.t(), self.bias, self.recipe)

    def __repr__(self) -> str:
        return f"HaloConv1D(nf={self.nf}, nx={self.nx}, {describe_recipe(self.recipe)})"
