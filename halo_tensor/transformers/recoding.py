"""``Recoding``: how close codes are to the values of the 8-bit checkpoint that they were made from."""

from dataclasses import dataclass, field
from math import sqrt

import torch

from halo_tensor.transformers.layouts import ROWS
from halo_tensor.weight.tensor import HaloWeight


@dataclass
class Recoding:
    """What became of the weights of a checkpoint that another library released in 8 bits.

    ``model.halo_recoding`` after :class:`HaloQuantConfig` has loaded such a checkpoint; ``print`` shows a summary.

    Attributes:
        layout: how the checkpoint codes weights.
        cosines: name of a weight -> cosine of its dequantised values and those of this library's codes, as vectors. Re-coding
            rounds a second time, and this is the loss.
        dequantised: names of parameters that are 8-bit in the checkpoint and in high precision in the model, since they belong
            to no layer that is converted. A warning names them.
        plain: names of weights that the checkpoint has in high precision. They stay so.

    Example:
        >>> from halo_tensor.transformers import Recoding
        >>> print(Recoding("fp8", {"up.weight": 0.99996, "down.weight": 0.99992}))
        2 weights of a checkpoint (fp8) were re-coded: cosine 0.99994 on average, at least 0.99992 (down.weight)
    """

    layout: str
    cosines: dict[str, float] = field(default_factory=dict)
    dequantised: list[str] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.cosines)} weights of a checkpoint ({self.layout}) were re-coded"]
        if self.cosines:
            lines[0] += f": cosine {self.mean:.5f} on average, at least {self.cosines[self.worst]:.5f} ({self.worst})"
        for names, what in (
            (self.dequantised, "dequantised"),
            (self.plain, "in high precision in the checkpoint, and left so"),
        ):
            if names:
                lines.append(f"  {what}: {listed(names)}")
        return "\n".join(lines)

    @property
    def mean(self) -> float:
        """The mean of the cosines; NaN without any."""
        return sum(self.cosines.values()) / len(self.cosines) if self.cosines else float("nan")

    @property
    def worst(self) -> str:
        """The name of the weight with the smallest cosine.

        Raises:
            ValueError: no weight was re-coded.
        """
        return min(self.cosines, key=self.cosines.__getitem__)


def cosine_of_codes(weight: HaloWeight, values: torch.Tensor) -> float:
    """Return the cosine of a weight's codes and of ``values``, of one shape. 1 if both are zero."""
    assert weight.operand is not None
    coded = weight.operand.dequantize()
    sums = torch.zeros(3, dtype=torch.float64, device=values.device)
    for a, b in zip(*(matrix.flatten(0, -2).split(ROWS) for matrix in (coded, values)), strict=True):
        a, b = a.float(), b.float()
        sums += torch.stack([(x * y).sum(dtype=torch.float64) for x, y in ((a, b), (a, a), (b, b))])
    dot, coded_square, square = sums.tolist()
    return dot / sqrt(coded_square * square) if coded_square * square else float(coded_square == square)


def listed(names: list[str], shown: int = 3) -> str:
    """Return some names as text, and how many more there are."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
