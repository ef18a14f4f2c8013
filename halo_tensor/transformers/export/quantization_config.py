"""The ``quantization_config`` of an exported checkpoint, as compressed-tensors 0.20 defines it, and the tensors it refers to.

A rotation of in_features is a transform at two locations: "input", which a server computes, and "weight_input", which is in
the codes already. compressed-tensors' "hadamard" is Sylvester's matrix without signs, which is ours for a power of two, and
servers have a fast kernel for it. For "random-hadamard" they multiply with the matrix that the checkpoint holds, of ±1:
``<layer>.<scheme>_input.weight``. Both divide by √block.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from halo_tensor.operand.tensor import HadamardQuantTensor
from halo_tensor.recipe import INT8, Format, Rotation
from halo_tensor.reference.hadamard import LARGEST_FACTOR, hadamard, signs

Codes = Mapping[str, HadamardQuantTensor]


def quantization_config(codes: Codes, ignored: Iterable[str], dtype: torch.dtype) -> dict[str, Any]:
    """Return the entry of config.json.

    Args:
        codes: name -> weight of each layer that is exported as codes.
        ignored: names of all other linear layers.
        dtype: of the activations.
    """
    ignore = sorted(ignored)
    by_format: dict[Format, list[str]] = {}
    by_rotation: dict[Rotation | None, list[str]] = {}
    for name, operand in codes.items():
        assert operand.format is not None
        by_format.setdefault(operand.format, []).append(name)
        by_rotation.setdefault(operand.column_rotation, []).append(name)
    groups = {
        f"group_{i}": _group(format, ["Linear"] if len(by_format) == 1 else names)
        for i, (format, names) in enumerate(by_format.items())
    }
    unrotated = by_rotation.pop(None, [])
    schemes = {}
    for rotation, names in by_rotation.items():
        assert rotation is not None
        targets, but = (names, []) if len(by_rotation) > 1 else (["Linear"], ignore + unrotated)
        schemes[scheme_name(rotation)] = _transform(rotation, targets, but, dtype)
    return {
        "quant_method": "compressed-tensors",
        "format": next(iter(groups.values()))["format"] if len(groups) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {"config_groups": schemes} if schemes else {},
    }


def scheme_name(rotation: Rotation) -> str:
    """The name of a rotation's transform, which is a part of names of tensors: "H128_seed0"."""
    return str(rotation).replace("·", "_")


def is_sylvester(rotation: Rotation) -> bool:
    """Whether a rotation is compressed-tensors' "hadamard"."""
    return rotation.seed is None and rotation.edge & (rotation.edge - 1) == 0


def matrices(codes: Codes, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the matrices of the rotations: name -> ±1, [block, block].

    One up to 256 stands beside each layer, so that a server that loads some of the layers finds it. A wider one stands beside
    the first layer: readers share it.
    """
    made: dict[str, torch.Tensor] = {}
    seen = set()
    for name, operand in codes.items():
        rotation = operand.column_rotation
        if rotation is None or (rotation in seen and rotation.edge > LARGEST_FACTOR):
            continue
        seen.add(rotation)
        matrix = signs(rotation.edge, rotation.seed)[:, None] * hadamard(rotation.edge)
        made[f"{name}.{scheme_name(rotation)}_input.weight"] = matrix.to(dtype)
    return made


def precision(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a server rotates. ±1 is exact in each; sums of a block may overflow float16."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _group(format: Format, targets: list[str]) -> dict[str, Any]:
    kind = {"num_bits": 8, "type": "int" if format == INT8 else "float", "symmetric": True}
    return {
        "targets": targets,
        "weights": {**kind, "strategy": "channel", "dynamic": False},
        "input_activations": {**kind, "strategy": "token", "dynamic": True},
        "output_activations": None,
        "format": "int-quantized" if format == INT8 else "float-quantized",
    }


def _transform(rotation: Rotation, targets: list[str], ignore: list[str], dtype: torch.dtype) -> dict[str, Any]:
    def place(location: str, inverse: bool) -> dict[str, Any]:
        return {"targets": targets, "location": location, "inverse": inverse, "ignore": ignore}

    return {
        "type": "hadamard" if is_sylvester(rotation) else "random-hadamard",
        "apply": [place("input", False), place("weight_input", True)],
        "randomize": False,
        "requires_grad": False,
        "head_dim": rotation.edge,
        "precision": str(precision(dtype)),
    }
