"""The parts of a model: its output embeddings, its adapters, and the parameters that multiply activations as matrices."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from halo_tensor.layers.kinds import features, is_experts, weights

#: Names of the last layer of a language model, for models that do not declare it.
_HEAD = re.compile(
    r"(^|_)(head|logits|unembed|unembedding|output|output_embedding|output_projection|embed_out|decoder|proj_out|lm_loss|vocab"
    r"|vocab_projector|vocab_projection)$"
)
#: Names under which PEFT's classes (0.21) hold the module that they adapt. A module of PEFT without any of them is an adapter
#: as a whole: prompt encoders, classifiers of mixtures of adapters.
_ADAPTED = {"base_layer", "base_model", "model", "original_module", "lora_model", "modules_to_save"}
#: Names of parameters of several dimensions that do not multiply activations: tables of positions and tokens, and biases.
_TABLE = re.compile(r"embed|pos|token|bias|table", re.IGNORECASE)
_STACK = "a stack of matrices, as of experts, which is not called through F.linear"


def output_embeddings(model: nn.Module) -> set[nn.Module]:
    """Return the modules that compute logits of a vocabulary.

    ``get_output_embeddings`` of the model, and of each model inside it, declares them. A linear layer outside of the modules
    that declare one is an output embedding if it has as many outputs as the largest ``nn.Embedding`` has entries, is outside
    of lists of blocks, and either is named like a head, or is the model's last linear layer and outside of all modules with
    that method.
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
        # It may be PEFT's wrapper of the layer, or a list of heads. FSMT returns its input embedding: that declares nothing.
        if isinstance(output, nn.Module) and not isinstance(output, nn.Embedding):
            declared |= set(output.modules())
            answered |= set(module.modules())
    return declared | _undeclared_heads(model, asked, answered)


def _undeclared_heads(model: nn.Module, asked: set[nn.Module], answered: set[nn.Module]) -> set[nn.Module]:
    """Return output embeddings by shape and name; ``asked``: modules with ``get_output_embeddings``; ``answered``: those among
    them that declare one.
    """
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
    """Return the name of a layer without PEFT's wrapper and without the numbers of its blocks."""
    path, dot, leaf = name.removesuffix(".base_layer").rpartition(".")
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path) + dot + leaf


def adapters(model: nn.Module) -> set[nn.Module]:
    """Return the modules that PEFT has added to a model: in its layers all but the layer that they wrap, and prompt
    encoders.
    """
    owned = []
    for module in model.modules():
        held = dict(module.named_children())
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            owned += [child for name, child in held.items() if name != "base_layer"]
        elif type(module).__module__.startswith("peft.") and not _ADAPTED & held.keys():
            owned.append(module)
    return {module for child in owned for module in child.modules()}


def matrices(model: nn.Module, min_features: int, with_adapters: bool) -> tuple[dict[str, int], dict[str, str]]:
    """Count the parameters that multiply activations as matrices.

    Input and output embeddings, norms and biases are not counted. A parameter that several modules hold is counted once.

    Args:
        model: converted or not.
        min_features: the least number of rows and of columns of a parameter that belongs to no layer of a known kind.
        with_adapters: count adapters too.

    Returns:
        The number of elements by the name of the layer, or of the parameter if it belongs to no layer of a known kind; and for
        each of these parameters, why its products stay in high precision.
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
    """Return the shorter side of a matrix.

    A shape of three dimensions is read as a stack [n, rows, columns] and as a matrix stored by heads [in, heads, features of a
    head], as XLNet has it, and the longer of the two sides is returned. A kernel [out, in, taps] is no matrix by heads.
    """
    by_heads = min(shape[0], shape[1:].numel()) if shape[-1] >= 16 else 0
    return max(min(shape[-2:]), by_heads)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a linear layer, a convolution or experts, including kinds that cannot be converted."""
    return features(module) is not None or isinstance(module, nn.modules.conv._ConvNd) or is_experts(module)


def _matrices_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield name and parameter for the module's own parameters with at least two dimensions longer than 1. Biases of experts
    are not among them.
    """
    for leaf, parameter in weights(module).items() if is_experts(module) else module._parameters.items():
        if parameter is not None and not nn.parameter.is_lazy(parameter) and sum(side > 1 for side in parameter.shape) > 1:
            yield leaf, parameter
