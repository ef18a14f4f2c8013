"""Small random models of transformers' architectures, and what is expected of each.

``tests/integration/test_zoo.py`` asserts what the tables at the end expect; ``bench/zoo.py`` writes down what it measures.
The names of classes and of their options are those of transformers 5.23.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.helpers.zoo import Case

TOKENS, VOCABULARY, PIXELS = 32, 96, 32
BASE = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DECODER = BASE | {"num_key_value_heads": 2, "head_dim": 16}


# The batches.


def _ids(length: int = TOKENS, low: int = 4, high: int = VOCABULARY) -> torch.Tensor:
    return torch.randint(low, high, (2, length), generator=torch.Generator().manual_seed(0))


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _tokens(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": _ids(), "attention_mask": torch.ones(2, TOKENS, dtype=torch.long)}


def _labelled(model: nn.Module) -> dict[str, Any]:
    return _tokens(model) | {"labels": _ids().flip(1)}


def _unmasked(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": _ids(), "labels": _ids().flip(1)}


def _pixels(model: nn.Module) -> dict[str, Any]:
    return {"pixel_values": _noise(2, 3, PIXELS, PIXELS)}


def _video(model: nn.Module) -> dict[str, Any]:
    return {"pixel_values": _noise(2, 2, 3, PIXELS, PIXELS)}


def _wave(model: nn.Module) -> dict[str, Any]:
    return {"input_values": _noise(2, 1600)}


def _pair(model: nn.Module) -> dict[str, Any]:
    return _tokens(model) | _pixels(model)


def _batch(**tensors: Any) -> Callable[[nn.Module], dict[str, Any]]:
    return lambda model: tensors


# The table.


def _causal(model: str, *, inputs=_labelled, **config: Any) -> Case:
    return Case(f"{model}ForCausalLM", "causal language model", inputs, DECODER | config)


def _language(model: str, *, inputs=_labelled, **config: Any) -> Case:
    return Case(model, "causal language model", inputs, BASE | config)


def _mixture(model: str, **config: Any) -> Case:
    experts = {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
    sizes = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
    return Case(f"{model}ForCausalLM", "mixture of experts", _labelled, DECODER | experts | sizes | config)


def _encoder(model: str, *, inputs=_labelled, **config: Any) -> Case:
    return Case(model, "encoder", inputs, BASE | {"intermediate_size": 128} | config)


def _seq2seq(model: str, *, inputs=_labelled, **config: Any) -> Case:
    sizes = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 1, "bos_token_id": 1}
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 2}
    return Case(model, "encoder and decoder", inputs, sizes | config)


def _t5(model: str, **config: Any) -> Case:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    sizes |= {"vocab_size": VOCABULARY, "decoder_start_token_id": 0, "pad_token_id": 0}
    return Case(model, "encoder and decoder", _labelled, sizes | config)


VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": PIXELS}
VISION |= {"patch_size": 8}


def _vision(model: str, *, inputs=_pixels, **config: Any) -> Case:
    return Case(model, "vision", inputs, VISION | config)


def _pyramid(model: str, *, inputs=_pixels, **config: Any) -> Case:
    """Of models whose stages have sizes of their own."""
    return Case(model, "vision", inputs, {"image_size": PIXELS} | config)


def _audio(model: str, *, inputs=_wave, **config: Any) -> Case:
    sizes = {"conv_dim": (32, 32), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2}
    sizes |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "apply_spec_augment": False, "layerdrop": 0.0}
    return Case(model, "audio", inputs, BASE | sizes | config)


def _speech(model: str, *, inputs=_wave, **config: Any) -> Case:
    return Case(model, "audio", inputs, config)


def _other(model: str, kind: str, inputs, **config: Any) -> Case:
    return Case(model, kind, inputs, config)


TEXT = BASE | {"projection_dim": 64}
TOWER = VISION | {"projection_dim": 64}


def _contrast(model: nn.Module) -> dict[str, Any]:
    return _pair(model) | {"return_loss": True}


def _towers(model: str, *, inputs=_contrast, text=None, vision=None, **config: Any) -> Case:
    both = {"text_config": TEXT | (text or {}), "vision_config": TOWER | (vision or {}), "projection_dim": 64}
    return Case(model, "image and text", inputs, both | config)


def _image_tokens(count: int, **more: Any) -> Callable[[nn.Module], dict[str, Any]]:
    """Text with ``count`` tokens that images take the place of."""

    def inputs(model: nn.Module) -> dict[str, Any]:
        ids = _ids()
        ids[:, 1 : 1 + count] = 3
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": _ids().flip(1)} | _pixels(model) | more

    return inputs


LLAMA = DECODER | {"model_type": "llama"}
QWEN_VL = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "patch_size": 8, "temporal_patch_size": 1}


def _qwen_vl(model: nn.Module) -> dict[str, Any]:
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    types = torch.zeros(2, TOKENS, dtype=torch.long)
    types[:, 1:5] = 1
    batch = _image_tokens(4)(model) | {"pixel_values": _noise(32, 3 * 64), "image_grid_thw": grid}
    return batch | {"mm_token_type_ids": types}


CASES = [
    *map(_causal, [
        "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Phi", "Phi3", "StableLm", "Olmo", "Olmo2",
        "Olmo3", "Cohere", "Cohere2", "Granite", "Starcoder2", "Glm", "Glm4", "Nemotron", "SmolLM3", "Exaone4", "Helium",
        "Arcee", "Ernie4_5", "SeedOss", "HunYuanDenseV1", "BitNet", "DiffLlama", "Persimmon", "GPTNeoX", "BioGpt", "Doge",
        "Ministral", "VaultGemma", "NanoChat", "Apertus",
    ]),
    _causal("Ministral3", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1,
                                           "original_max_position_embeddings": 64}),
    _causal("Lfm2", layer_types=["conv", "full_attention"]),
    _causal("RecurrentGemma", num_hidden_layers=3, attention_window_size=16, lru_width=64),
    _causal("Mamba", state_size=16, time_step_rank=16),
    _causal("Mamba2", num_heads=16, head_dim=8, state_size=16, n_groups=2, chunk_size=16),
    _causal("FalconMamba", state_size=16, time_step_rank=16),
    _causal("Rwkv", attention_hidden_size=64, context_length=64, inputs=_unmasked),
    _causal("Bamba", num_hidden_layers=2, attn_layer_indices=[1], mamba_n_heads=16, mamba_d_head=8, mamba_d_state=16,
            mamba_chunk_size=16),
    _causal("FalconH1", mamba_n_heads=16, mamba_d_head=8, mamba_d_ssm=128, mamba_d_state=16, mamba_chunk_size=16),
    _causal("Zamba2", num_hidden_layers=2, layers_block_type=["mamba", "hybrid"], mamba_d_state=16, n_mamba_heads=16, mamba_headdim=8,
            mamba_ngroups=1, chunk_size=16, num_mem_blocks=1, adapter_rank=16),
    _causal("Jamba", attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=4,
            use_mamba_kernels=False, mamba_dt_rank=16),
    _causal("Qwen3Next", layer_types=["linear_attention", "full_attention"], num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=32, shared_expert_intermediate_size=64, linear_num_key_heads=2, linear_num_value_heads=4,
            linear_key_head_dim=16, linear_value_head_dim=16),
    _language("FalconForCausalLM"),
    _language("GPT2LMHeadModel", n_positions=64),
    _language("OpenAIGPTLMHeadModel", n_positions=64),
    _language("GPTBigCodeForCausalLM"),
    _language("GPTNeoForCausalLM", attention_types=[[["global", "local"], 1]], num_layers=2, window_size=16),
    _language("GPTJForCausalLM", rotary_dim=8),
    _language("CodeGenForCausalLM", rotary_dim=8),
    _language("BloomForCausalLM"),
    _language("OPTForCausalLM", ffn_dim=128, word_embed_proj_dim=64),
    _language("MptForCausalLM", expansion_ratio=2),
    _language("XGLMForCausalLM", d_model=64, ffn_dim=128, num_layers=2, attention_heads=4),
    _language("CTRLLMHeadModel", dff=128),
    _other("TrOCRForCausalLM", "causal language model", _labelled, vocab_size=VOCABULARY, d_model=64, decoder_layers=2,
           decoder_attention_heads=4, decoder_ffn_dim=128, max_position_embeddings=64, pad_token_id=0),
    _other("XLNetLMHeadModel", "causal language model", _labelled, vocab_size=VOCABULARY, d_model=64, n_layer=2, n_head=4,
           d_inner=128),
    _language("ReformerModelWithLMHead", axial_pos_shape=(4, 8), axial_pos_embds_dim=(32, 32), attn_layers=["local", "lsh"],
              feed_forward_size=128, attention_head_size=16, local_attn_chunk_length=8, lsh_attn_chunk_length=8, num_buckets=2,
              is_decoder=True, hash_seed=0),
    _mixture("Mixtral"),
    _mixture("Qwen2Moe"),
    _mixture("Qwen3Moe"),
    _mixture("GptOss", rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    _mixture("DeepseekV2", kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
             num_key_value_heads=4, first_k_dense_replace=1, n_group=1, topk_group=1),
    _mixture("DeepseekV3", kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
             num_key_value_heads=4, first_k_dense_replace=1, n_group=1, topk_group=1),
    _mixture("Glm4Moe", first_k_dense_replace=1, n_group=1, topk_group=1),
    _mixture("GraniteMoe"),
    _mixture("GraniteMoeShared", shared_intermediate_size=64),
    _mixture("GraniteMoeHybrid", layer_types=["mamba", "attention"], mamba_n_heads=16, mamba_d_head=8, mamba_d_state=16,
             mamba_chunk_size=16, shared_intermediate_size=64),
    _mixture("Olmoe"),
    _mixture("FlexOlmo"),
    _mixture("Phimoe"),
    _mixture("Dots1", n_shared_experts=1, routed_scaling_factor=1.0, first_k_dense_replace=1, n_group=1, topk_group=1),
    _mixture("Ernie4_5_Moe", moe_num_experts=4, moe_k=2, moe_layer_start_index=0),
    _mixture("HunYuanMoEV1", moe_topk=2),
    _mixture("MiniMax", block_size=16),
    _mixture("MiniMaxM2"),
    _mixture("JetMoe", kv_channels=16),
    _mixture("Llama4", intermediate_size_mlp=128),
    _mixture("Lfm2Moe", layer_types=["conv", "full_attention"], num_dense_layers=1),
    _mixture("LongcatFlash", kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
             num_key_value_heads=4, num_layers=2, zero_expert_num=2, moe_topk=2, expert_ffn_hidden_size=32, ffn_hidden_size=128),
    _mixture("Gemma4", vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=16, global_head_dim=16,
             layer_types=["sliding_attention", "full_attention"], sliding_window=16, enable_moe_block=True, top_k_experts=2),
    _mixture("Qwen3_5Moe", layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
             linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16),
    _mixture("Afmoe", num_dense_layers=1, layer_types=["sliding_attention", "full_attention"]),
    *map(_encoder, [
        "BertForMaskedLM", "RobertaForMaskedLM", "CamembertForMaskedLM", "XLMRobertaForMaskedLM",
        "RobertaPreLayerNormForMaskedLM", "ElectraForMaskedLM", "ErnieForMaskedLM", "MegatronBertForMaskedLM",
        "MPNetForMaskedLM", "RoFormerForMaskedLM", "DebertaForMaskedLM", "DebertaV2ForMaskedLM", "RemBertForMaskedLM",
        "EsmForMaskedLM", "NystromformerForMaskedLM", "SplinterModel", "FNetForMaskedLM", "ModernBertForMaskedLM",
        "NomicBertModel", "Data2VecTextForMaskedLM", "MarkupLMModel",
    ]),
    _encoder("DistilBertForMaskedLM", dim=64, hidden_dim=128, n_layers=2, n_heads=4),
    _encoder("AlbertForMaskedLM", embedding_size=32),
    _encoder("MobileBertForMaskedLM", embedding_size=32, intra_bottleneck_size=32, true_hidden_size=32),
    _encoder("SqueezeBertForMaskedLM", embedding_size=64),
    _encoder("ConvBertForMaskedLM", embedding_size=64),
    _encoder("LiltModel", hidden_size=96, channel_shrink_ratio=2, max_2d_position_embeddings=64, inputs=_tokens),
    _encoder("LongformerForMaskedLM", attention_window=8),
    _encoder("BigBirdForMaskedLM", attention_type="original_full"),
    _other("FunnelForMaskedLM", "encoder", _labelled, vocab_size=VOCABULARY, block_sizes=[1, 1], num_decoder_layers=1,
           d_model=64, n_head=4, d_head=16, d_inner=128),
    _encoder("IBertForMaskedLM", quant_mode=False),
    _encoder("CanineModel", inputs=_tokens, num_hash_buckets=64, downsampling_rate=2, upsampling_kernel_size=4,
             local_transformer_stride=16),
    _encoder("LayoutLMForMaskedLM", max_2d_position_embeddings=64),
    _other("PerceiverForMaskedLM", "encoder", _labelled, vocab_size=VOCABULARY, max_position_embeddings=TOKENS, d_model=64,
           d_latents=64, num_latents=16, num_blocks=1, num_self_attends_per_block=2, num_self_attention_heads=4,
           num_cross_attention_heads=4, qk_channels=64, v_channels=64),
    _encoder("FlaubertWithLMHeadModel", emb_dim=64, n_layers=2, n_heads=4, n_words=VOCABULARY),
    _encoder("XLMWithLMHeadModel", emb_dim=64, n_layers=2, n_heads=4, n_words=VOCABULARY),
    *map(_t5, ("T5ForConditionalGeneration", "MT5ForConditionalGeneration", "UMT5ForConditionalGeneration")),
    _t5("LongT5ForConditionalGeneration", local_radius=8),
    _t5("SwitchTransformersForConditionalGeneration", num_experts=4, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1),
    *map(_seq2seq, [
        "BartForConditionalGeneration", "MBartForConditionalGeneration", "PegasusForConditionalGeneration",
        "BlenderbotForConditionalGeneration", "BlenderbotSmallForConditionalGeneration", "M2M100ForConditionalGeneration",
        "PLBartForConditionalGeneration", "MarianMTModel",
    ]),
    _seq2seq("LEDForConditionalGeneration", attention_window=8, max_encoder_position_embeddings=64,
             max_decoder_position_embeddings=64),
    _other("ProphetNetForConditionalGeneration", "encoder and decoder", _labelled, vocab_size=VOCABULARY, hidden_size=64,
           encoder_ffn_dim=128, decoder_ffn_dim=128, num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4,
           num_decoder_attention_heads=4, max_position_embeddings=64, pad_token_id=0, decoder_start_token_id=1),
    _seq2seq("BigBirdPegasusForConditionalGeneration", attention_type="original_full"),
    _seq2seq("PegasusXForConditionalGeneration", num_global_tokens=8, block_size=16),
    _seq2seq("NllbMoeForConditionalGeneration", num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2),
    _seq2seq("FSMTForConditionalGeneration", src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY, langs=["a", "b"]),
    _seq2seq("T5GemmaForConditionalGeneration", encoder=DECODER, decoder=DECODER),
    *map(_vision, [
        "ViTForImageClassification", "DeiTModel", "ViTMSNModel", "Dinov2Model", "Dinov2WithRegistersModel", "IJepaModel",
        "SiglipVisionModel", "CLIPVisionModel", "DINOv3ViTModel", "Aimv2VisionModel",
    ]),
    _vision("BeitModel", layer_scale_init_value=1.0),
    _vision("Data2VecVisionModel", layer_scale_init_value=1.0),
    _vision("YolosModel", image_size=[PIXELS, PIXELS], num_detection_tokens=4),
    _vision("ViTMAEForPreTraining", decoder_hidden_size=64, decoder_num_hidden_layers=1, decoder_num_attention_heads=4,
            decoder_intermediate_size=128),
    _vision("VJEPA2Model", crop_size=PIXELS, frames_per_clip=2, tubelet_size=2, mlp_ratio=2, pred_hidden_size=32,
            pred_num_hidden_layers=1, pred_num_attention_heads=2, pred_num_mask_tokens=1, pred_mlp_ratio=2,
            inputs=_batch(pixel_values_videos=_noise(2, 2, 3, PIXELS, PIXELS))),
    _vision("VideoMAEModel", num_frames=2, tubelet_size=2, inputs=_video),
    _vision("VivitModel", num_frames=2, tubelet_size=[2, 8, 8], inputs=_video),
    _vision("TimesformerModel", num_frames=2, inputs=_video),
    _pyramid("SwinForImageClassification", embed_dim=32, depths=[1, 1], num_heads=[2, 4], window_size=4, patch_size=4),
    _pyramid("Swinv2Model", embed_dim=32, depths=[1, 1], num_heads=[2, 4], window_size=4, patch_size=4),
    _pyramid("HieraModel", embed_dim=32, depths=[1, 1], num_heads=[1, 2], image_size=[64, 64], embed_dim_multiplier=2.0,
             num_query_pool=1, masked_unit_size=[8, 8], inputs=_batch(pixel_values=_noise(2, 3, 64, 64))),
    _pyramid("ConvNextModel", layer_scale_init_value=1.0, hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1]),
    _pyramid("ConvNextV2Model", hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1]),
    _pyramid("SegformerForSemanticSegmentation", hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1],
             num_attention_heads=[1, 2, 4, 4], decoder_hidden_size=64),
    _pyramid("PvtModel", hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 4, 4]),
    _pyramid("PvtV2Model", hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 4, 4]),
    _pyramid("CvtModel", embed_dim=[16, 32, 64], depth=[1, 2, 3], num_heads=[1, 2, 4]),
    _pyramid("LevitModel", image_size=64, hidden_sizes=[32, 48, 64], depths=[1, 1, 1], key_dim=[16, 16, 16],
             num_attention_heads=[2, 3, 4], down_ops=[["Subsample", 16, 2, 4, 2, 2], ["Subsample", 16, 3, 4, 2, 2]],
             inputs=_batch(pixel_values=_noise(2, 3, 64, 64))),
    _pyramid("MobileViTModel", initializer_range=0.2, hidden_sizes=[32, 48, 64], neck_hidden_sizes=[16, 16, 32, 32, 48, 64, 64]),
    _pyramid("FocalNetModel", embed_dim=32, depths=[1, 1], focal_levels=[1, 1], focal_windows=[3, 3]),
    _pyramid("SwiftFormerModel", layer_scale_init_value=1.0, depths=[1, 1, 1, 1], embed_dims=[16, 32, 32, 64]),
    _pyramid("PoolFormerModel", hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1]),
    _pyramid("ResNetModel", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1]),
    _pyramid("RegNetModel", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], groups_width=16),
    _pyramid("MobileNetV2Model", depth_multiplier=0.35),
    _pyramid("BitModel", embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], num_groups=8),
    _pyramid("SamVisionModel", initializer_range=0.02, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, patch_size=8, mlp_dim=128,
             output_channels=32, window_size=2, global_attn_indexes=[1]),
    _other("DetrModel", "vision", _pixels, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
           backbone_config={"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]},
           d_model=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=128, decoder_ffn_dim=128,
           encoder_attention_heads=4, decoder_attention_heads=4, num_queries=8),
    *map(_audio, [
        "Wav2Vec2Model", "HubertModel", "UniSpeechModel", "UniSpeechSatModel", "WavLMModel", "Data2VecAudioModel",
    ]),
    _audio("SEWModel", squeeze_factor=2),
    _audio("Wav2Vec2ConformerModel"),
    _audio("Wav2Vec2BertModel", feature_projection_input_dim=32, inputs=_batch(input_features=_noise(2, 40, 32))),
    _speech("WhisperForConditionalGeneration", num_mel_bins=16, max_source_positions=32, max_target_positions=64, d_model=64,
            encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128,
            decoder_ffn_dim=128, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, begin_suppress_tokens=None, suppress_tokens=None,
            inputs=lambda model: {"input_features": _noise(2, 16, 64), "labels": _ids().flip(1)}),
    _speech("Speech2TextForConditionalGeneration", d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, vocab_size=VOCABULARY, input_channels=1,
            input_feat_per_channel=16, conv_channels=32, pad_token_id=0, max_source_positions=64, max_target_positions=64,
            inputs=lambda model: {"input_features": _noise(2, 64, 16), "labels": _ids().flip(1)}),
    _speech("MoonshineForConditionalGeneration", hidden_size=64, intermediate_size=128, encoder_num_hidden_layers=2,
            decoder_num_hidden_layers=2, encoder_num_attention_heads=4, decoder_num_attention_heads=4, vocab_size=VOCABULARY,
            pad_token_id=0, inputs=lambda model: {"input_values": _noise(2, 3200), "labels": _ids().flip(1)}),
    _speech("ASTModel", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, patch_size=8,
            frequency_stride=8, time_stride=8, max_length=64, num_mel_bins=16,
            inputs=_batch(input_values=_noise(2, 64, 16))),
    _speech("EncodecModel", num_filters=8, hidden_size=32, codebook_size=16, codebook_dim=32, upsampling_ratios=[4, 2],
            target_bandwidths=[24.0], inputs=_batch(input_values=_noise(2, 1, 320))),
    _towers("CLIPModel"),
    _towers("SiglipModel"),
    _towers("Siglip2Model", vision={"num_patches": 16}, inputs=lambda model: _tokens(model) | {
        "pixel_values": _noise(2, 16, 192), "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]), "return_loss": True}),
    _towers("AltCLIPModel"),
    _towers("ChineseCLIPModel"),
    _towers("CLIPSegModel"),
    _towers("OwlViTModel"),
    _towers("BlipForConditionalGeneration", inputs=lambda model: _labelled(model) | _pixels(model),
            text={"encoder_hidden_size": 64}),
    _towers("GroupViTModel", vision={"depths": [1, 1, 0], "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 0]}),
    _other("ViltModel", "image and text", lambda model: _pair(model) | {
        "pixel_mask": torch.ones(2, PIXELS, PIXELS, dtype=torch.long)}, **BASE | VISION),
    _other("GitForCausalLM", "image and text", _pair, **BASE, vision_config=VISION),
    _other("VisualBertModel", "image and text", lambda model: _tokens(model) | {
        "visual_embeds": _noise(2, 8, 32), "visual_attention_mask": torch.ones(2, 8)}, **BASE, visual_embedding_dim=32),
    _other("LlavaForConditionalGeneration", "image and text", _image_tokens(16), text_config=LLAMA,
           vision_config=VISION | {"model_type": "clip_vision_model"}, image_token_index=3, image_token_id=3),
    _other("PaliGemmaForConditionalGeneration", "image and text", lambda model: _image_tokens(16)(model) | {
           "token_type_ids": torch.ones(2, TOKENS, dtype=torch.long)},
           text_config=DECODER | {"model_type": "gemma"}, vision_config=VISION | {"model_type": "siglip_vision_model"},
           image_token_index=3, image_token_id=3, projection_dim=64),
    _other("Gemma3ForConditionalGeneration", "image and text", lambda model: _image_tokens(4)(model) | {
           "token_type_ids": (_image_tokens(4)(model)["input_ids"] == 3).long()},
           text_config=DECODER, vision_config=VISION | {"model_type": "siglip_vision_model"}, image_token_id=3,
           image_token_index=3, mm_tokens_per_image=4),
    _other("Qwen2VLForConditionalGeneration", "image and text", _qwen_vl, text_config=DECODER | {
           "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
           vision_config=QWEN_VL | {"mlp_ratio": 2}, image_token_id=3, video_token_id=95, vision_start_token_id=94),
    _other("Qwen2_5_VLForConditionalGeneration", "image and text", _qwen_vl, text_config=DECODER | {
           "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
           vision_config=QWEN_VL | {"intermediate_size": 128, "out_hidden_size": 64, "fullatt_block_indexes": [1],
                                    "window_size": 16}, image_token_id=3, video_token_id=95, vision_start_token_id=94),
    _other("Idefics3ForConditionalGeneration", "image and text", lambda model: _image_tokens(4)(model) | {
           "pixel_values": _noise(2, 1, 3, PIXELS, PIXELS)}, text_config=LLAMA, vision_config=VISION, scale_factor=2,
           image_token_id=3),
    _other("SmolVLMForConditionalGeneration", "image and text", lambda model: _image_tokens(4)(model) | {
           "pixel_values": _noise(2, 1, 3, PIXELS, PIXELS)}, text_config=LLAMA, vision_config=VISION, scale_factor=2,
           image_token_id=3),
    _other("InternVLForConditionalGeneration", "image and text", _image_tokens(4), text_config=DECODER | {
           "model_type": "qwen2"}, vision_config=VISION | {"patch_size": [8, 8], "image_size": [PIXELS, PIXELS]},
           image_token_id=3),
    _other("Blip2ForConditionalGeneration", "image and text", _image_tokens(8),
           text_config=BASE | {"model_type": "opt", "ffn_dim": 128, "word_embed_proj_dim": 64},
           vision_config=VISION, qformer_config=BASE | {"encoder_hidden_size": 64}, num_query_tokens=8, image_token_index=3,
           image_token_id=3),
    _other("DecisionTransformerModel", "other", lambda model: {
           "states": _noise(2, 8, 17), "actions": _noise(2, 8, 4), "returns_to_go": _noise(2, 8, 1),
           "timesteps": torch.arange(8).repeat(2, 1), "attention_mask": torch.ones(2, 8)}, **BASE, max_ep_len=16,
           n_positions=64),
    _other("PatchTSTModel", "other", _batch(past_values=_noise(2, 32, 2)), num_input_channels=2, context_length=32,
           patch_length=16, patch_stride=8, d_model=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4),
    _other("TimeSeriesTransformerModel", "other", lambda model: {
           "past_values": _noise(2, 23), "past_time_features": _noise(2, 23, 2), "past_observed_mask": torch.ones(2, 23),
           "future_values": _noise(2, 8), "future_time_features": _noise(2, 8, 2)}, prediction_length=8, context_length=16,
           lags_sequence=[1, 7], num_time_features=2, d_model=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=128,
           decoder_ffn_dim=128, encoder_attention_heads=4, decoder_attention_heads=4),
]  # fmt: skip

#: The architectures that are not converted as a whole, with the converted share, by the reason that leaves out most of the rest. If
#: more than half is left out, there is a warning; if the share is 0, an error.
LEFT = {
    "fewer than min_features=16 features on a side": {
        "DogeForCausalLM": 0.998, "SwitchTransformersForConditionalGeneration": 0.998,
        "NllbMoeForConditionalGeneration": 0.998, "Swinv2Model": 0.913, "TimeSeriesTransformerModel": 0.991,
        "HunYuanMoEV1ForCausalLM": 0.998, "Gemma4ForCausalLM": 0.996, "AfmoeForCausalLM": 0.997,
    },
    "of convolutions, only nn.Conv2d is converted": {
        "Lfm2ForCausalLM": 0.998, "Mamba2ForCausalLM": 0.975, "BambaForCausalLM": 0.993, "FalconH1ForCausalLM": 0.99,
        "Zamba2ForCausalLM": 0.988, "SqueezeBertForMaskedLM": 0.267, "ConvBertForMaskedLM": 0.906, "CanineModel": 0.767,
        "VJEPA2Model": 0.76, "VideoMAEModel": 0.727, "VivitModel": 0.739, "Wav2Vec2Model": 0.765, "HubertModel": 0.765,
        "UniSpeechModel": 0.765, "UniSpeechSatModel": 0.765, "WavLMModel": 0.762, "Data2VecAudioModel": 0.176,
        "SEWModel": 0.785, "Wav2Vec2ConformerModel": 0.687, "Wav2Vec2BertModel": 0.779,
        "WhisperForConditionalGeneration": 0.914, "Speech2TextForConditionalGeneration": 0.928,
        "MoonshineForConditionalGeneration": 0.667, "Qwen2VLForConditionalGeneration": 0.947,
        "Qwen2_5_VLForConditionalGeneration": 0.951, "Qwen3NextForCausalLM": 0.99, "Qwen3_5MoeForCausalLM": 0.99,
        "GraniteMoeHybridForCausalLM": 0.998, "Lfm2MoeForCausalLM": 0.998,
    },
    "a stack of matrices, as of experts, which is not called through F.linear": {
        "RecurrentGemmaForCausalLM": 0.941, "XLNetLMHeadModel": 0.444, "JetMoeForCausalLM": 0.034, "Llama4ForCausalLM": 0.272,
        "LongcatFlashForCausalLM": 0.684, "FunnelForMaskedLM": 0.889,
    },
    "a matrix of a JambaMambaMixer, which is no layer": {
        "JambaForCausalLM": 0.985,
    },
    "it is a PhimoeTopKRouter, whose forward may be its own": {
        "PhimoeForCausalLM": 0.998,
    },
    "a matrix of a MambaMixer, which is no layer": {
        "MambaForCausalLM": 0.928,
    },
    "a matrix of a FalconMambaMixer, which is no layer": {
        "FalconMambaForCausalLM": 0.928,
    },
    "its name matches skip='lm_head'": {
        "RobertaForMaskedLM": 0.941, "CamembertForMaskedLM": 0.941, "XLMRobertaForMaskedLM": 0.941,
        "RobertaPreLayerNormForMaskedLM": 0.941, "MPNetForMaskedLM": 0.941, "EsmForMaskedLM": 0.941,
        "Data2VecTextForMaskedLM": 0.941, "LongformerForMaskedLM": 0.957,
    },
    "a Conv2d follows recipes with a plain forward only, as hot_config()'s": {
        "NystromformerForMaskedLM": 0.993, "ViTForImageClassification": 0.841, "DeiTModel": 0.85, "ViTMSNModel": 0.842,
        "Dinov2Model": 0.889, "Dinov2WithRegistersModel": 0.889, "IJepaModel": 0.842, "SiglipVisionModel": 0.741,
        "CLIPVisionModel": 0.842, "DINOv3ViTModel": 0.842, "Aimv2VisionModel": 0.885, "BeitModel": 0.842,
        "Data2VecVisionModel": 0.842, "YolosModel": 0.85, "ViTMAEForPreTraining": 0.903, "TimesformerModel": 0.897,
        "SwinForImageClassification": 0.977, "HieraModel": 0.924, "ConvNextModel": 0.678, "ConvNextV2Model": 0.678,
        "SegformerForSemanticSegmentation": 0.482, "PvtModel": 0.618, "PvtV2Model": 0.509, "CvtModel": 0.842,
        "LevitModel": 0.957, "MobileViTModel": 0.395, "FocalNetModel": 0.638, "SwiftFormerModel": 0.206,
        "SamVisionModel": 0.736, "DetrModel": 0.93, "ASTModel": 0.941, "CLIPModel": 0.919, "SiglipModel": 0.841,
        "AltCLIPModel": 0.95, "ChineseCLIPModel": 0.919, "CLIPSegModel": 0.919, "OwlViTModel": 0.919,
        "BlipForConditionalGeneration": 0.932, "GroupViTModel": 0.991, "ViltModel": 0.85, "GitForCausalLM": 0.917,
        "LlavaForConditionalGeneration": 0.923, "PaliGemmaForConditionalGeneration": 0.848,
        "Gemma3ForConditionalGeneration": 0.826, "Idefics3ForConditionalGeneration": 0.927,
        "SmolVLMForConditionalGeneration": 0.927, "InternVLForConditionalGeneration": 0.929,
        "Blip2ForConditionalGeneration": 0.946, "PoolFormerModel": 0.0, "ResNetModel": 0.0, "RegNetModel": 0.0,
        "MobileNetV2Model": 0.0,
    },
    "a matrix of a PerceiverEmbeddings, which is no layer": {
        "PerceiverForMaskedLM": 0.992,
    },
    "a matrix of a MultiheadAttention, which is no layer": {
        "Siglip2Model": 0.909,
    },
    "a width that is no multiple of 16": {
        "DecisionTransformerModel": 0.973,
    },
    "it is a WeightStandardizedConv2d, whose forward may be its own": {
        "BitModel": 0.0,
    },
    "a matrix of a QuantLinear, which is no layer": {
        "IBertForMaskedLM": 0.0,
    },
    "a matrix of a LSTM, which is no layer": {
        "EncodecModel": 0.0,
    },
}  # fmt: skip
#: Bounds: the least cosine of the gradients, the largest difference of the losses and the largest distance of the outputs from those
#: of the exported model. They are wide where tokens choose an expert, a group or a bucket, because rounding can change a choice.
BOUNDS = {
    "": (0.99, 0.01, 0.03),
    "SwitchTransformersForConditionalGeneration": (0.7, 0.02, 0.1),
    "FlexOlmoForCausalLM": (0.95, 0.01, 0.1),
    "Gemma4ForCausalLM": (0.9, 0.01, 0.15),
    "GptOssForCausalLM": (0.95, 0.01, 0.1),
    "ReformerModelWithLMHead": (0.8, 0.01, 0.03),
    "GroupViTModel": (0.9, 0.3, 0.03),
    "AltCLIPModel": (0.99, 0.03, 0.03),
    "SiglipModel": (0.99, 0.01, 0.06),
}


def expected_share(case: Case) -> tuple[float, str | None]:
    """Return the expected share, and the main reason for leaving out the rest."""
    return next(((models[case.model], reason) for reason, models in LEFT.items() if case.model in models), (1.0, None))
