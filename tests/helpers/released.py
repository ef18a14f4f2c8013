"""Small checkpoints in the 8-bit layouts of other libraries, made of plain ones."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

#: Largest values of the dtypes of codes.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def coded(weight, block, dtype=torch.float8_e4m3fn):
    """Codes of a matrix, and a float32 scale for each block, of which the last ones may be partial."""
    rows, columns = (side or width for side, width in zip(block, weight.shape, strict=True))
    scale = torch.stack(
        [torch.stack([part.abs().max() for part in band.split(columns, 1)]) for band in weight.float().split(rows)]
    )
    scale = scale.clamp_min(1e-12) / LARGEST[dtype]
    wide = scale.repeat_interleave(rows, 0)[: len(weight)].repeat_interleave(columns, 1)[:, : weight.shape[1]]
    scaled = weight.float() / wide
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


def write_released(plain, folder, config, block, dtype=torch.float8_e4m3fn, scale_name="weight_scale_inv", skip=("lm_head",)):
    """Write the checkpoint of a folder in 8 bits.

    Args:
        plain: the folder of a plain checkpoint.
        folder: where to write.
        config: the ``quantization_config``.
        block: the rows and columns that share a scale; None for all.
        dtype: of codes.
        scale_name: of the scale, after the layer's name.
        skip: parts of the names of matrices that stay in high precision, besides the embeddings.

    Returns:
        the folder, and its tensors dequantised in float32.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, values = {}, {}
    for file in sorted(Path(plain).glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            tensors[name] = values[name] = tensor
            if tensor.ndim == 2 and not any(part in name for part in ("embed_tokens", *skip)):
                tensors[name], scale = coded(tensor, block, dtype)
                shape = () if block == (None, None) else scale.shape
                tensors[name.removesuffix("weight") + scale_name] = scale.view(shape)
                sides = [side or width for side, width in zip(block, tensor.shape, strict=True)]
                wide = scale.repeat_interleave(sides[0], 0)[: len(tensor)].repeat_interleave(sides[1], 1)
                values[name] = tensors[name].float() * wide[:, : tensor.shape[1]]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    text = json.loads((Path(plain) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(text | {"quantization_config": config}))
    return folder, values


def fp8_config(block=(128, 128), **fields):
    """The ``quantization_config`` of DeepSeek-V3, Qwen3-FP8 and MiniMax."""
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block and list(block)} | fields


def w8a8_config(kind="int", strategy="channel", **weights):
    """A ``quantization_config`` of compressed-tensors, as llm-compressor writes it."""
    activations = {"num_bits": 8, "type": kind, "strategy": "token", "symmetric": True, "dynamic": True}
    weights = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False} | weights
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
        "ignore": ["lm_head"],
    }
