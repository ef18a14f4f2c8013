"""``nn.Conv2d`` that follows a recipe."""

import torch
import torch.nn.functional as F
from torch import nn

from halo_tensor.layers.printing import describe_recipe
from halo_tensor.products.conv2d import Geometry, conv2d
from halo_tensor.recipe import Recipe

# allow_in_graph: as in halo_tensor.weight.tensor.
_conv2d_in_graph = torch.compiler.allow_in_graph(conv2d)


class HaloConv2d(nn.Conv2d):
    """An ``nn.Conv2d`` that follows ``recipe``; its parameters, state dict and forward are nn.Conv2d's."""

    recipe: Recipe

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode), (0, 0)
        geometry = Geometry(self.kernel_size, self.stride, padding, self.dilation, self.groups)
        if input.ndim == 3:
            return _conv2d_in_graph(input.unsqueeze(0), weight, bias, self.recipe, geometry).squeeze(0)
        return _conv2d_in_graph(input, weight, bias, self.recipe, geometry)

    def extra_repr(self) -> str:
        """Describe the convolution and its recipe."""
        how = "" if self.recipe.quantizes_convolution(is_pointwise(self)) else "input saved by "
        return f"{super().extra_repr()}, {how}{describe_recipe(self.recipe)}"


def is_pointwise(module: nn.Conv2d) -> bool:
    """Whether it is a 1×1 convolution."""
    return module.kernel_size == (1, 1)
