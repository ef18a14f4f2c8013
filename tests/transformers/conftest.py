"""Folders of small checkpoints. Test modules skip themselves without transformers, so it is imported in fixtures only."""

import pytest
import torch

from halo_tensor import balance_


def saved_llama(folder, max_shard_size="50GB", **fields):
    """``folder``, with a saved model."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=128, num_key_value_heads=fields["num_attention_heads"], **fields)
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@pytest.fixture(scope="package")
def plain(tmp_path_factory):
    """The folder of a saved model of two layers, in shards."""
    sizes = {"vocab_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
    return saved_llama(tmp_path_factory.mktemp("plain"), "500KB", attention_bias=True, **sizes)


@pytest.fixture(scope="package")
def tiny(tmp_path_factory):
    """The folder of a saved model of one layer."""
    sizes = {"vocab_size": 192, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    return saved_llama(tmp_path_factory.mktemp("tiny"), **sizes)


@pytest.fixture(scope="package")
def quantised(tiny, tmp_path_factory):
    """Folders of quantised checkpoints, by dtype; int8's is balanced."""
    import transformers

    from tests.helpers.checkpoints import CONFIGS, IDS

    folders = {}
    for dtype, config in CONFIGS.items():
        folders[dtype] = tmp_path_factory.mktemp(dtype)
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny, quantization_config=config)
        if dtype == "int8":
            balance_(model, IDS)
        model.save_pretrained(folders[dtype])
    return folders
