"""Which bits are saved for backward of what stands between converted layers."""

from dataclasses import dataclass

from halo_tensor.recipe.formats import Constant

BITS = (8, 6, 4)


@dataclass(frozen=True)
class Activations(Constant):
    """The bits of an element of what is saved between converted layers, in rotated blocks of 128 elements; None saves a tensor
    as it is. Of a ReLU, one bit an element is saved: whether its result is zero.

    Attributes:
        inner: tensors between two layers of an MLP, such as the gate and up of SwiGLU and the input of GELU.
        norms: inputs of norms, which are mostly the residual stream.
        attention: q, k, v and the result of attention.
        whole: whether the whole model is treated so, and not only the blocks that contain converted layers. Masks are then
            saved in one bit an element, and the positions that a max pooling saves in 16 or 32 bits.

    Raises:
        ValueError: bits other than 8, 6 and 4.
    """

    inner: int | None = 8
    norms: int | None = 8
    attention: int | None = 8
    whole: bool = False

    def __post_init__(self) -> None:
        for name in ("inner", "norms", "attention"):
            if (bits := getattr(self, name)) is not None and bits not in BITS:
                raise ValueError(f"{name} must be one of {', '.join(map(str, BITS))} bits, or None; got {bits!r}")


#: The choices of a config, by name: what each loses is in docs/memory.md.
ACTIVATIONS: dict[str, Activations | None] = {
    "plain": None,
    "int8": Activations(),
    "int6": Activations(6, 4, 8),
    "all": Activations(whole=True),
    "all-int4": Activations(4, 4, 4, whole=True),
}
