"""Models of Llama's shapes, and of a mixture of experts, with random weights."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from halo_tensor import keep_products, linear_cross_entropy


def shape(hidden: int, intermediate: int, layers: int, heads: int, vocab: int, tied: bool = True, kv_heads: int = 8) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


def mixture(base: dict, experts: int, top_k: int, width: int, head_dim: int) -> dict:
    """Return the shape of a Qwen3-MoE whose layers but for the experts have the shape ``base``."""
    sizes = {"num_experts": experts, "num_experts_per_tok": top_k, "moe_intermediate_size": width, "head_dim": head_dim}
    return base | sizes


def qwen3_30b(layers: int) -> dict:
    """Return the shape of Qwen3-30B-A3B with so many layers."""
    base = shape(2048, 6144, layers, heads=32, vocab=151936, tied=False, kv_heads=4)
    return mixture(base, 128, 8, 768, head_dim=128)


SHAPES = {
    "8b-blocks": shape(4096, 14336, layers=2, heads=32, vocab=128),
    "1b": shape(2048, 8192, layers=16, heads=32, vocab=128256),
    "3b": shape(3072, 8192, layers=28, heads=24, vocab=128256),
    "8b": shape(4096, 14336, layers=32, heads=32, vocab=128256, tied=False),
    "30b-a3b": qwen3_30b(layers=48),
    "30b-a3b-6-layers": qwen3_30b(layers=6),  # 4.4 billion parameters
    "tiny": shape(128, 256, layers=3, heads=2, vocab=512, kv_heads=1),
    "tiny-mixture": mixture(shape(128, 256, layers=2, heads=2, vocab=512, kv_heads=1), 4, 2, 128, head_dim=64),
}


#: What backward recomputes -> options of torch.utils.checkpoint: nothing, whole layers, or everything except products.
RECOMPUTED: dict[str, dict | None] = {"no": None, "layers": {}, "products": {"context_fn": keep_products}}


def split(name: str) -> tuple[str, str]:
    """Split NAME, NAME/layers or NAME/products into the contender and what it recomputes."""
    contender, _, recompute = name.partition("/")
    return contender, recompute or "no"


def _block(layer: nn.Module, hidden: torch.Tensor, angles: tuple, recompute: str) -> torch.Tensor:
    options = RECOMPUTED[recompute]
    if options is None:
        return layer(hidden, position_embeddings=angles)
    return checkpoint(layer, hidden, position_embeddings=angles, use_reentrant=False, **options)


def _loss(norm: nn.Module, head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(norm(hidden)).float().flatten(0, 1), labels.flatten())


def _fused_loss(norm: nn.Module, head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return linear_cross_entropy(norm(hidden), head.weight, labels)


def _liger_loss(norm: nn.Module, head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(norm(hidden).flatten(0, 1), head.weight, labels.flatten())


class Llama(nn.Module):
    """Llama called without an attention mask.

    LlamaModel.forward makes a mask under torch.compile, and attention then does not use its causal kernel.

    Args:
        shape: arguments of LlamaConfig, or of Qwen3MoeConfig.
        recompute: a key of RECOMPUTED (activation checkpointing).
    """

    def __init__(self, shape: dict, recompute: str = "no"):
        super().__init__()
        config = (Qwen3MoeConfig if "num_experts" in shape else LlamaConfig)(**shape)
        self.llama = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        self.recompute, self._block, self._loss = recompute, _block, _loss

    def fuse_head(self, by: str) -> None:
        """Compute the head and its loss by linear_cross_entropy ("halo_tensor") or Liger-Kernel ("liger").

        Liger's function is not compiled: compile the model by "blocks".
        """
        self._loss = {"halo_tensor": _fused_loss, "liger": _liger_loss}[by]

    def compile_as(self, one: str, **options: Any) -> None:
        """Compile the model.

        Args:
            one: "model" compiles one graph. "blocks" compiles each layer and the loss separately; equal layers share code.
                "no" compiles nothing.
            **options: of torch.compile.
        """
        if one == "model":
            self.compile(**options)
        elif one == "blocks":
            self._block = torch.compile(_block, **options)
            if self._loss is not _liger_loss:
                self._loss = torch.compile(self._loss, **options)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return the last hidden states of hidden states ``x``; with labels, the loss of token ids ``x``."""
        model = self.llama.model
        hidden = x if labels is None else model.embed_tokens(x)
        angles = model.rotary_emb(hidden, torch.arange(hidden.shape[1], device=x.device).unsqueeze(0))
        for layer in model.layers:
            hidden = self._block(layer, hidden, angles, self.recompute)
        return hidden if labels is None else self._loss(model.norm, self.llama.lm_head, hidden, labels)
