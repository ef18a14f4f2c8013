"""The gate between the two products of an expert, as data."""

from dataclasses import dataclass
from typing import Self

from halo_tensor.recipe.formats import Constant


@dataclass(frozen=True)
class Gate(Constant):
    """SwiGLU and its relatives: a = (up + shift) · gate · sigmoid(alpha · gate).

    ==================================================  =====================================
    gate                                                models
    ==================================================  =====================================
    ``Gate()``                                          Qwen3-MoE, Mixtral, DeepSeek-V3, OLMoE
    ``Gate(1.702, 7.0, 1.0, interleaved=True)``         gpt-oss
    ==================================================  =====================================

    Attributes:
        alpha: inside of the sigmoid.
        limit: ``gate`` is clamped to at most this, and ``up`` to ±limit; None clamps nothing.
        shift: is added to ``up``.
        interleaved: ``gate`` and ``up`` are the even and the odd columns; else they are the first and the second half.
    """

    alpha: float = 1.0
    limit: float | None = None
    shift: float = 0.0
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"a gate's limit must be positive, or None; got {self.limit}")

    def __str__(self) -> str:
        return f"{self.alpha!r},{self.limit!r},{self.shift!r},{int(self.interleaved)}"

    @classmethod
    def of(cls, text: str) -> Self:
        """Return the gate that ``str(gate)`` wrote as ``text``."""
        alpha, limit, shift, interleaved = text.split(",")
        return cls(float(alpha), None if limit == "None" else float(limit), float(shift), interleaved == "1")
