"""The tensors of a weight in a quantised checkpoint.

========================  ============================================================================================
``x.weight``              the codes in one row: int8, fp8 e4m3, or four fp6 codes in three bytes. A reader without this
                          module stops at their shape, so it does not take them for weights.
``x.weight_scale``        float32, [out_features] or [].
``x.weight_balance``      of a balanced layer: the exponents of its gain, int8 [in_features].
``x.weight_recipe``       a text, UTF-8 in uint8, that says what the codes were made with.
========================  ============================================================================================

Weights of experts are stored in the same way under their own names, ``x.experts.down_proj`` for example: the codes of all
rows, expert by expert, and scales [experts, out_features].

A checkpoint whose ``config.json`` says something else than its records is refused, and so are parts that are missing or
damaged. 0.1.0 wrote no records.
"""

from collections.abc import Sequence

import torch

from halo_tensor.calibration.balance import LARGEST_EXPONENT
from halo_tensor.operand import gains
from halo_tensor.operand.experts import ExpertsOperand
from halo_tensor.operand.tensor import HadamardQuantTensor
from halo_tensor.recipe import TENSOR, Format, Recipe, Rotation, Scales, W
from halo_tensor.reference import codes as formats
from halo_tensor.reference.hadamard import fit
from halo_tensor.weight.tensor import HaloWeight

#: Codes, scale, balance, record: what follows the name of a weight, as patterns. Before transformers 5.21 a name goes to the
#: first of these patterns that it begins with.
PARTS = (r"(?!\w)", r"_scale(?!\w)", r"_balance(?!\w)", r"_recipe(?!\w)")


def parts_of(name: str, weight: HaloWeight) -> dict[str, torch.Tensor]:
    """Return what the checkpoint holds of a weight of codes: name -> tensor."""
    operand = weight.operand
    assert operand is not None and operand.codes is not None and operand.scale is not None
    scale = operand.stacked_scales() if isinstance(operand, ExpertsOperand) else operand.scale
    parts = {name: operand.codes.contiguous().flatten(), f"{name}_scale": scale}
    if weight.gain is not None:
        parts[f"{name}_balance"] = weight.gain.log2().round().to(torch.int8)
    record = _record(
        operand.format, operand.granularity, operand.column_rotation, operand.shape, operand.gain is not None,
        weight.in_features_first,
    )  # fmt: skip
    return parts | {f"{name}_recipe": torch.tensor(list(record.encode()), dtype=torch.uint8)}


def operand_of(
    parts: Sequence[torch.Tensor | None], like: torch.Tensor, recipe: Recipe, in_features_first: bool = False
) -> HadamardQuantTensor:
    """Return the operand that a weight brings to its products.

    Args:
        parts: what the checkpoint has of ``PARTS``, in their order.
        like: a tensor of the weight's shape [out, in] or [experts, out, in], and dtype.
        recipe: what config.json says.
        in_features_first: whether the weight of experts is [experts, in, out].

    Raises:
        ValueError: a part is missing, or is not what such a weight has under this recipe.
    """
    stored, scale, exponents, record = parts
    if stored is None or scale is None:
        raise ValueError(f"its {'codes are' if stored is None else 'scale is'} missing")
    spec = recipe.output.right
    assert spec.format is not None
    *_, out, width = (*like.shape[:-2], *like.shape[:-3:-1]) if in_features_first else like.shape
    rows = out * like.shape[0] if like.ndim == 3 else out
    granularity, rotation = spec.granularity.on(W), fit(spec.in_features, width)
    if record is not None:
        written = bytes(record.to(torch.uint8).flatten().tolist()).decode(errors="replace")
        expected = _record(spec.format, granularity, rotation, like.shape, exponents is not None, in_features_first)
        if written != expected:
            raise ValueError(
                f"its codes were written as ({written}), and by config.json and what else the file has of it they are "
                f"({expected}). Use the config.json that it was saved with"
            )
    scales = list(granularity.shape(rows, width))
    stacked = [like.shape[0], out] if like.ndim == 3 else scales
    tensors: dict[str, torch.Tensor | None] = {
        "codes": _checked_codes(stored, like, spec.format).view(rows, -1),
        "codes_t": None,
        "scale": _checked_scale(scale, stacked).view(scales),
    }
    attributes = {"granularity": granularity, "row_rotation": None, "column_rotation": rotation, "format": spec.format}
    operand: HadamardQuantTensor
    if like.ndim == 3:
        operand = ExpertsOperand(like.shape, like.dtype, tensors, attributes | {"in_features_first": in_features_first})
    else:
        operand = HadamardQuantTensor(like.shape, like.dtype, tensors, attributes)
    if exponents is not None:
        operand.gains = gains.of_exponents(_checked_exponents(exponents, width))
    return operand


def described(tensor: torch.Tensor) -> str:
    """Return dtype and shape of a tensor as text, "int8 [128]" for example."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _record(
    format: Format | None, granularity: Scales, rotation: Rotation | None, shape: Sequence[int], balanced: bool,
    in_features_first: bool,
) -> str:  # fmt: skip
    """Return a text that says how the codes of a weight are to be read.

    Codes can be read if the texts are equal. Levels 1 and 2 differ in E only, so they have equal texts.
    """
    scale = "one scale" if granularity == TENSOR else f"a scale per {granularity}"
    rotated = f"rotated by {rotation}" if rotation else "not rotated"
    order = ", in_features before out_features" if in_features_first else ""
    return f"{format} {list(shape)}{order}, {scale}, {rotated}, {'balanced' if balanced else 'not balanced'}"


def _checked_codes(stored: torch.Tensor, like: torch.Tensor, format: Format) -> torch.Tensor:
    dtype = formats.code_dtype(format) if format.bits == 8 else torch.uint8
    size = like.numel() * format.bits // 8
    # transformers before 5.21 casts fp8 codes to the model's dtype.
    castable = dtype.is_floating_point and stored.dtype == like.dtype
    if list(stored.shape) != [size] or not (stored.dtype == dtype or castable):
        raise ValueError(
            f"its codes are {described(stored)}, where a weight {list(like.shape)} in {format} has {size} of {dtype}"
        )
    codes = stored.to(dtype)
    if castable and not torch.equal(codes.to(stored.dtype), stored):
        raise ValueError(f"some of its codes are not finite, or no {format} numbers")
    if dtype == torch.int8 and codes.numel() and codes.min() < -format.max:
        raise ValueError(f"some of its codes are {codes.min().item()}, beyond ±{format.max:.0f}")
    if dtype == torch.float8_e4m3fn and ((codes.view(torch.uint8) & 0x7F) == 0x7F).any():
        raise ValueError("some of its codes are NaN")
    return codes


def _checked_scale(scale: torch.Tensor, shape: list[int]) -> torch.Tensor:
    if (scale.dtype, list(scale.shape)) != (torch.float32, shape):
        raise ValueError(f"its scale is {described(scale)}, where it has to be float32 {shape}")
    if not ((scale > 0) & scale.isfinite()).all():
        raise ValueError("some of its scales are not finite and positive: the file is damaged, or the weight was not finite")
    return scale


def _checked_exponents(exponents: torch.Tensor, in_features: int) -> torch.Tensor:
    if (exponents.dtype, list(exponents.shape)) != (torch.int8, [in_features]):
        raise ValueError(f"its balance is {described(exponents)}, where it has to be int8 {[in_features]}")
    if (exponents.int().abs() > LARGEST_EXPONENT).any():
        raise ValueError(f"some exponents of its balance are beyond ±{LARGEST_EXPONENT}")
    return exponents
