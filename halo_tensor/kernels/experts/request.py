"""A request for a grouped product, which backends answer."""

from typing import Any, NamedTuple

import torch

from halo_tensor.kernels.rotate import norm
from halo_tensor.recipe import Rotation


class GroupedRequest(NamedTuple):
    """A product of :func:`halo_tensor.reference.experts.grouped_mm`, or of ``grouped_grad`` if ``along_tokens``.

    A request stands for all numbers of rows, experts and widths. In ``grouped_mm`` a scale multiplies rows, and in
    ``grouped_grad`` rows of each expert's result.

    Attributes:
        device: where the operands are.
        code: the dtype of the codes.
        along_tokens: whether the product contracts tokens.
        scaled: whether there is a scale for each column of each expert.
        bias: the dtype of the bias, or None.
        weighted: whether rows are multiplied last.
        gain: whether columns are multiplied.
        rotation: the rotation of columns that the epilogue undoes.
        dtype: of the result.
    """

    device: torch.device
    code: torch.dtype
    along_tokens: bool
    scaled: bool
    bias: torch.dtype | None
    weighted: bool
    gain: bool
    rotation: Rotation | None
    dtype: torch.dtype

    @property
    def integer(self) -> bool:
        """Whether the codes are int8."""
        return self.code == torch.int8

    @property
    def constants(self) -> dict[str, Any]:
        """The constants that all kernels share."""
        return {
            "ALONG_TOKENS": self.along_tokens, "INTEGER": self.integer, "SCALED": self.scaled, "BIASED": self.bias is not None,
            "WEIGHTED": self.weighted, "GAIN": self.gain, "RIGHT": self.rotation is not None, "NORM": norm(self.rotation),
        }  # fmt: skip
