"""Classes that ``torch.load(file, weights_only=True)`` may build: weights, operands, and the recipes that they follow.

Files name classes by module. Modules have moved since 0.1.0, so the names of that version are accepted as well.
"""

import torch

from halo_tensor.operand.experts import ExpertsOperand
from halo_tensor.operand.tensor import HadamardQuantTensor
from halo_tensor.recipe import Format, Operand, Product, Recipe, Rotation, Scales
from halo_tensor.weight.tensor import HaloWeight

#: The names of these classes in files that 0.1.0 wrote.
_NAMES_OF_0_1_0 = [
    (HaloWeight, "halo_tensor.weight.HaloWeight"),
    (HadamardQuantTensor, "halo_tensor.tensor.HadamardQuantTensor"),
    *((kind, f"halo_tensor.recipe.{kind.__name__}") for kind in (Format, Operand, Product, Recipe, Rotation)),
]
torch.serialization.add_safe_globals(
    [HaloWeight, HadamardQuantTensor, ExpertsOperand, Format, Operand, Product, Recipe, Rotation, Scales, *_NAMES_OF_0_1_0]
)
