"""Small models of transformers with experts in parameters of three dimensions."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

IDS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))
#: The names of the families, and what their configs say beyond the sizes that all share.
FAMILIES = {
    "Qwen3Moe": {"moe_intermediate_size": 48},
    "Mixtral": {"intermediate_size": 48},
    "GptOss": {"intermediate_size": 48, "layer_types": ["full_attention"]},
    "DeepseekV3": {
        "moe_intermediate_size": 48, "first_k_dense_replace": 0, "n_routed_experts": 6, "n_group": 1, "topk_group": 1,
        "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    },
    "Olmoe": {"intermediate_size": 48},
}  # fmt: skip


def mixture(family: str, seed: int = 0, layers: int = 1, experts: int = 6, **more):
    """Return a random model, by default with six experts, two for each token."""
    sizes = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "num_experts": experts,
        "num_local_experts": experts,
        "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    options = sizes | FAMILIES.get(family, {}) | more
    if family == "DeepseekV3":
        options["num_key_value_heads"] = 4
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:  # large enough that gates are not linear, and biases are not zero
                parameter.normal_(0, 0.3 if "bias" in name else parameter.shape[-1] ** -0.5)
    return model


def experts_of(model) -> dict:
    """Return the modules of experts by name."""
    return {name: m for name, m in model.named_modules() if name.endswith(".experts")}
