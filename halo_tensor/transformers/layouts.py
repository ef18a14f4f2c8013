"""The layouts in which 8-bit checkpoints are released: what such a checkpoint holds of a weight, and which values that means.

===================  =======================================  ============================================================
``quant_method``     of ``x.weight``                          one scale for
===================  =======================================  ============================================================
fp8                  e4m3, ``x.weight_scale_inv`` [or, oc]    a block of ``weight_block_size``, 128×128 for example
fp8                  e4m3, ``x.weight_scale(_inv)`` [] or [1]  the whole weight
compressed-tensors   int8 or e4m3, ``x.weight_scale``         the weight, a row, a group of a row's elements, or a block
===================  =======================================  ============================================================

In all of them a value is code × scale, "inv" or not. The last blocks of a row and of a column may be partial. Scales of
activations are not read: products quantise their activations themselves. Sources: transformers' FineGrainedFP8Config and
Fp8Dequantize (5.23.0), and compressed-tensors' QuantizationArgs (0.20.1).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open

#: What the checkpoint may hold of a weight, after "x.weight".
WEIGHT, SCALE_INV, SCALE, ZERO_POINT = "", "_scale_inv", "_scale", "_zero_point"
PARTS = (WEIGHT, SCALE_INV, SCALE, ZERO_POINT)
#: What it may hold of a layer's activations, after "x.".
OF_ACTIVATIONS = ("input_scale", "input_zero_point", "activation_scale")
#: Rows that are dequantised at once.
ROWS = 256

#: The rows and columns that share a scale. None: all of them.
Block = tuple[int | None, int | None]


@dataclass(frozen=True)
class Layout:
    """How the weights of a checkpoint are coded.

    Attributes:
        method: the ``quant_method`` of its config.json.
        dtypes: those of codes.
        blocks: which elements may share a scale. The shape of the scale says which of them do.
    """

    method: str
    dtypes: tuple[torch.dtype, ...]
    blocks: tuple[Block, ...]

    def __str__(self) -> str:
        dtypes = " or ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        return f"{self.method}: {dtypes} with a scale for {' or '.join(map(_described, self.blocks))}"

    def is_plain(self, parts: Mapping[str, torch.Tensor]) -> bool:
        """Whether the checkpoint holds a weight in high precision. ``parts``: what it has of ``PARTS``."""
        weight = parts.get(WEIGHT)
        return parts.keys() == {WEIGHT} and weight is not None and weight.is_floating_point() and weight.element_size() > 1

    def values(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Return the dequantised weight [out, in], rounded to ``dtype`` once. Only ``ROWS`` rows are in float32 at a time.

        Args:
            parts: what the checkpoint has of ``PARTS``. A weight in high precision is cast.
            dtype: of the result.

        Raises:
            ValueError: a part is missing or of another dtype or shape than this layout has, or a value is not finite.
        """
        if self.is_plain(parts):
            return parts[WEIGHT].to(dtype)
        codes, scale = self._checked(parts)
        grid, (rows, columns) = self._grid(codes, scale)
        values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        step = -(-ROWS // rows) * rows
        finite = torch.ones((), dtype=torch.bool, device=codes.device)
        for start in range(0, len(codes), step):
            piece = codes[start : start + step].float()
            scales = grid[start // rows : -(-(start + len(piece)) // rows)].float()
            scales = scales.repeat_interleave(rows, 0)[: len(piece)].repeat_interleave(columns, 1)
            values[start : start + step] = piece.mul_(scales[:, : codes.shape[1]])
            finite &= values[start : start + step].isfinite().all()
        if not finite:
            raise ValueError("some of its values are not finite: the file is damaged, or the weight was not finite")
        return values

    def _checked(self, parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and their scale."""
        codes, scales = parts.get(WEIGHT), [parts[name] for name in (SCALE_INV, SCALE) if name in parts]
        if codes is None:
            raise ValueError("its codes are missing, and its scale is there")
        if codes.dtype not in self.dtypes:
            raise ValueError(f"it is {_tensor(codes)}, where the config.json says {self}")
        if len(scales) != 1:
            raise ValueError("it has a weight_scale and a weight_scale_inv" if scales else "its scale is missing")
        if codes.ndim != 2:
            raise ValueError(f"it is {_tensor(codes)}: only matrices are read, each with a scale of its own")
        if ZERO_POINT in parts and parts[ZERO_POINT].any():
            raise ValueError("it has zero points that are not 0: only symmetric codes are read")
        scale = scales[0]
        if not scale.is_floating_point():
            raise ValueError(f"its scale is {_tensor(scale)}, where it has to be of a floating dtype")
        return codes, scale

    def _grid(self, codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """The scales as a matrix, and the rows and columns that share one."""
        matrix = scale.view(-1, 1) if scale.ndim < 2 else scale
        for block in self.blocks:
            rows, columns = (side or width for side, width in zip(block, codes.shape, strict=True))
            if list(matrix.shape) == [-(-codes.shape[0] // rows), -(-codes.shape[1] // columns)]:
                return matrix, (rows, columns)
        raise ValueError(
            f"its scale is {_tensor(scale)}, which does not divide a weight {list(codes.shape)} into parts that are "
            f"{' or '.join(map(_described, self.blocks))}"
        )


def layout_of(config: Mapping[str, Any]) -> Layout:
    """Return the layout of a checkpoint.

    Args:
        config: the ``quantization_config`` of its config.json.

    Raises:
        ValueError: it is not known; the message says which are.
    """
    method = _plain(config.get("quant_method"))
    readers = {"fp8": _fine_grained_fp8, "compressed-tensors": _compressed_tensors}
    if method not in readers:
        raise _refusal(f"its quant_method is {method!r}")
    return readers[method](config)


def is_code(tensor: Any) -> bool:
    """Whether a tensor, or a slice of a safetensors file, has a dtype in which codes are stored."""
    if hasattr(tensor, "get_dtype"):
        return tensor.get_dtype() in ("I8", "U8", "F8_E4M3", "F8_E5M2")
    return tensor.dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)


def refuse_codes(files: Sequence[str] | None) -> None:
    """Raise an error if a checkpoint has codes, while its config.json has no ``quantization_config`` that is known.

    Args:
        files: those of the checkpoint, of which the safetensors are looked at.
    """
    for file in files or ():
        if not str(file).endswith(".safetensors"):
            continue
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_slice(name)
                if name.endswith(".weight") and is_code(tensor) and len(tensor.get_shape()) > 1:  # this library's have one
                    raise _refusal(f"{name} is 8-bit, and config.json does not say how, in a way that is known")


def _fine_grained_fp8(config: Mapping[str, Any]) -> Layout:
    for key, known in (("fmt", "e4m3"), ("expert_dtype", "fp8")):
        if config.get(key, known) != known:
            raise _refusal(f"its {key} is {config[key]!r}")
    block = config.get("weight_block_size", (128, 128))
    blocks: tuple[Block, ...] = ((None, None),) if block is None else (_sides(block), (None, None))
    return Layout("fp8", (torch.float8_e4m3fn,), blocks)


def _compressed_tensors(config: Mapping[str, Any]) -> Layout:
    if config.get("transform_config"):
        raise _refusal("its weights are stored rotated (transform_config)")
    if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise _refusal("its weights are stored sparse (sparsity_config)")
    groups = {name: group for name, group in (config.get("config_groups") or {}).items() if (group or {}).get("weights")}
    if not groups:
        raise _refusal("its config_groups name no quantised weights")
    dtypes, blocks = zip(*(_scheme(name, group, config.get("format")) for name, group in groups.items()), strict=True)
    return Layout("compressed-tensors", tuple(dict.fromkeys(dtypes)), tuple(dict.fromkeys(blocks)))


def _scheme(name: str, group: Mapping[str, Any], format: str | None) -> tuple[torch.dtype, Block]:
    """The dtype and the block of one of the config_groups."""
    weights, format = group["weights"], group.get("format") or format
    kind = {"int": torch.int8, "float": torch.float8_e4m3fn}.get(_plain(weights.get("type")))
    where = f"the weights of its config group {name!r} are"
    if weights.get("num_bits") != 8 or kind is None:
        raise _refusal(f"{where} {weights.get('type')} of {weights.get('num_bits')} bits")
    if format not in ("int-quantized", "float-quantized", "naive-quantized"):
        raise _refusal(f"{where} in the format {format!r}")
    if not weights.get("symmetric", True):
        raise _refusal(f"{where} not symmetric")
    if weights.get("actorder") == "group":
        raise _refusal(f"{where} in another order (actorder)")
    strategy, size = _plain(weights.get("strategy")), weights.get("group_size")
    if strategy == "block":
        return kind, _sides(weights.get("block_structure"))
    if strategy == "group" and isinstance(size, int) and size > 0:
        return kind, (1, size)
    if strategy in ("tensor", "channel"):
        return kind, (None, None) if strategy == "tensor" else (1, None)
    raise _refusal(f"{where} scaled by {strategy!r} (group_size {size!r})")


def _sides(block: Any) -> Block:
    sides = block.split("x") if isinstance(block, str) else block
    try:
        rows, columns = (int(side) for side in sides)
    except (TypeError, ValueError):
        rows = columns = 0
    if rows < 1 or columns < 1:
        raise _refusal(f"its block size is {block!r}, which is not two positive numbers")
    return rows, columns


def _plain(value: Any) -> Any:
    """The value of a member of an enum."""
    return getattr(value, "value", value)


def _refusal(why: str) -> ValueError:
    return ValueError(
        f"this checkpoint is quantised in a layout that cannot be read: {why}. These can: quant_method 'fp8' (e4m3 with a "
        "scale per block or weight), and 'compressed-tensors' with symmetric 8-bit int or float weights and a scale per "
        "weight, row, group or block. Otherwise load it dequantised, by its own library, and call quantize_"
    )


def _described(block: Block) -> str:
    names: dict[Block, str] = {(None, None): "the weight", (1, None): "a row"}
    return names.get(block) or f"a block of {block[0]}×{block[1]}"


def _tensor(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
