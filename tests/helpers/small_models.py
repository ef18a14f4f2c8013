"""Small models of transformers."""

import pydoc_data.topics
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
TEXT = "\n".join(list(pydoc_data.topics.topics.values())[:20])
IDS = torch.arange(64).view(2, 32)
SMALL = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(**options):
    config = {**SMALL, "vocab_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "tie_word_embeddings": False}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config | options))


def gpt2(**options):
    config = {"vocab_size": 128, "n_embd": 128, "n_layer": 1, "n_head": 4, "n_positions": 64}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config | no_dropout | options))


def falcon():
    config = {**SMALL, "vocab_size": 128, "num_kv_heads": 4, "new_decoder_architecture": True, "bias": True}
    return transformers.FalconForCausalLM(transformers.FalconConfig(**config))


def mixtral():
    config = {**SMALL, "vocab_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "num_local_experts": 4}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**config))


def linears(model) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def small_llama(vocabulary: int = 128):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def save_small_model(folder: Path) -> None:
    """Save a model and a tokenizer for ``from_pretrained``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.save_pretrained(folder)
    small_llama(300).save_pretrained(folder)
