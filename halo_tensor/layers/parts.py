"""What a model's parameters are for: which linear layers are output embeddings, what belongs to adapters, and how many
parameters multiply activations as matrices."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from halo_tensor.layers import kinds as layers

#: How the last layer of a language model is called, where the model does not say which it is.
_HEAD = re.compile(
    r"(^|_)(head|logits|unembed|unembedding|output|output_embedding|output_projection|embed_out|decoder|proj_out|lm_loss|vocab"
    r"|vocab_projector|vocab_projection)$"
)
#: By these names PEFT's classes (0.21) hold what they adapt. A class of PEFT that holds none of them is all adapter: prompt
#: encoders, classifiers of mixtures of adapters.
_ADAPTED = {"base_layer", "base_model", "model", "original_module", "lora_model", "modules_to_save"}
#: Parameters of several dimensions that no activation is multiplied with: tables of positions and tokens, and biases.
_TABLE = re.compile(r"embed|pos|token|bias|table", re.IGNORECASE)
_STACK = "a stack of matrices, as of experts, which is not called through F.linear"


def output_embeddings(model: nn.Module) -> set[nn.Module]:
    """The modules that make logits of a vocabulary.

    They are what ``get_output_embeddings`` of the model, or of a model inside it, returns. A linear layer of no module that
    returns one is an output embedding if it has as many outputs as the largest ``nn.Embedding`` has entries, is outside of
    lists of blocks, and is named like a head; or is the model's last linear layer, and of no module with that method.
    """
    declared: set[nn.Module] = set()
    asked: set[nn.Module] = set()
    answered: set[nn.Module] = set()
    for module in model.modules():
        try:
            declare = getattr(module, "get_output_embeddings", None)
            output = declare() if callable(declare) else None
        except NotImplementedError:
            continue
        if callable(declare):
            asked |= set(module.modules())
        # A wrapper of PEFT's around the layer, or a list of heads. FSMT returns its input embedding, which says nothing.
        if isinstance(output, nn.Module) and not isinstance(output, nn.Embedding):
            declared |= set(output.modules())
            answered |= set(module.modules())
    return declared | _undeclared_heads(model, asked, answered)


def _undeclared_heads(model: nn.Module, asked: set[nn.Module], answered: set[nn.Module]) -> set[nn.Module]:
    vocabulary = max((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=None)
    of_adapters = adapters(model)
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m not in of_adapters]
    repeated = {m for block in model.modules() if isinstance(block, nn.ModuleList) for m in block.modules()}
    counts: dict[str, int] = {}
    for name, _ in linears:
        counts[_kind(name)] = counts.get(_kind(name), 0) + 1
    return {
        module
        for name, module in linears
        if module.out_features == vocabulary
        and module not in answered | repeated
        and counts[_kind(name)] == 1
        and ((module is linears[-1][1] and module not in asked) or _HEAD.search(_kind(name).rpartition(".")[2]))
    }


def _kind(name: str) -> str:
    """The name of a layer without PEFT's wrapper, and without the numbers of the blocks that it is in."""
    path, dot, leaf = name.removesuffix(".base_layer").rpartition(".")
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path) + dot + leaf


def adapters(model: nn.Module) -> set[nn.Module]:
    """What PEFT has added to a model: what its layers hold besides the layer that they wrap, and its prompt encoders."""
    owned = []
    for module in model.modules():
        held = dict(module.named_children())
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            owned += [child for name, child in held.items() if name != "base_layer"]
        elif type(module).__module__.startswith("peft.") and not _ADAPTED & held.keys():
            owned.append(module)
    return {module for child in owned for module in child.modules()}


def matrices(model: nn.Module, min_features: int, with_adapters: bool) -> tuple[dict[str, int], dict[str, str]]:
    """How many parameters multiply activations as matrices.

    Embeddings, input and output, are not counted, nor are norms, biases and, unless ``with_adapters``, adapters. A parameter
    that several modules hold is counted once.

    Returns:
        elements, by the name of the layer, or of the parameter where it belongs to no layer of a known kind; and of those
        parameters with at least ``min_features`` rows and columns, why their products stay in high precision.
    """
    sizes: dict[str, int] = {}
    reasons: dict[str, str] = {}
    left_out = output_embeddings(model) | (set() if with_adapters else adapters(model))
    left_out |= {m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    seen = {id(p) for m in left_out for p in m._parameters.values()}
    for name, module in model.named_modules():
        if module in left_out:
            continue
        for leaf, parameter in _matrices_of(module):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            full = f"{name}.{leaf}".removeprefix(".")
            if is_layer(module):
                key = name
            elif isinstance(module, ParametrizationList):
                key = name.rpartition("parametrizations.")[0].removesuffix(".")
            elif _least_side(parameter.shape) >= min_features and not _TABLE.search(leaf):
                key = full
                reasons[key] = _STACK if parameter.ndim > 2 else f"a matrix of a {type(module).__name__}, which is no layer"
            else:
                continue
            sizes[key] = sizes.get(key, 0) + parameter.numel()
    return sizes, reasons


def _least_side(shape: torch.Size) -> int:
    """The shorter side of a matrix, of one of a stack [n, rows, columns], or of one that is stored by heads, as XLNet's
    [in, heads, features of a head]: whichever is longer. A kernel [out, in, taps] is not taken for the latter."""
    by_heads = min(shape[0], shape[1:].numel()) if shape[-1] >= 16 else 0
    return max(min(shape[-2:]), by_heads)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a linear layer or a convolution, of a kind that can be converted or not."""
    return layers.features(module) is not None or isinstance(module, nn.modules.conv._ConvNd)


def _matrices_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The parameters of a module itself that have at least two dimensions longer than 1."""
    for leaf, parameter in module._parameters.items():
        if parameter is not None and not nn.parameter.is_lazy(parameter) and sum(side > 1 for side in parameter.shape) > 1:
            yield leaf, parameter
