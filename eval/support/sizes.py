"""How small a model of each type is made: sizes by field, and what single types need besides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VOCABULARY = 128
PAD, BOS, EOS, VISION_START, VIDEO, IMAGE = 0, 1, 2, 97, 98, 99
CODES = range(100, 116)
"""Token ids of an image that is drawn as words (Chameleon, Emu3)."""

TOKENS: Mapping[str, int] = {
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "video_token_id": VIDEO,
    "image_token_id": IMAGE,
}
SIZES: Mapping[str, int] = {
    # vocabulary and width
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": 64,
    "d_model": 64,
    "embed_dim": 64,
    "out_hidden_size": 64,
    "text_hidden_size": 64,
    "mm_hidden_size": 64,
    "projection_dim": 64,
    "projector_hidden_size": 64,
    "merged_hidden_size": 256,
    "projector_input_dim": 64,
    "projector_output_dim": 64,
    "base_channels": 32,
    "vision_output_dim": 64,
    "word_embed_proj_dim": 64,
    "hidden_size_per_layer_input": 8,
    # depth
    "depth": 2,
    "layers": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    # heads
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "num_sliding_attention_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "head_dim": 16,
    "global_head_dim": 16,
    "swa_head_dim": 16,
    "num_kv_shared_layers": 0,
    # windows, shorter than the prompt
    "sliding_window": 8,
    "sliding_window_size": 8,
    "attention_chunk_size": 16,
    # multi-head latent and indexed attention
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "qk_head_dim": 32,
    "v_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    # linear attention and state spaces
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    # feed-forward layers and experts
    "intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "dense_intermediate_size": 96,
    "shared_intermediate_size": 32,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "block_ff_dim": 96,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "decoder_ffn_hidden_size": 96,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
"""No field becomes larger than its default."""

VISION: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
}
# stands in for towers that need the timm package; features are given, so no tower runs
_SIGLIP = {"model_type": "siglip_vision_model", **VISION}
_QFORMER: Mapping[str, Any] = {
    "vision_config.image_size": 32,
    "qformer_config.encoder_hidden_size": 64,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_VQ: Mapping[str, Any] = {"channel_multiplier": [1, 1], "num_res_blocks": 1}

MADE: Mapping[str, Mapping[str, Any]] = {
    "blip-2": {"num_query_tokens": 16},
    "chameleon": {
        "vocabulary_map": {"<image>": IMAGE}
        | {f"IMGIMG{chr(65 + index)}Z": code for index, code in enumerate(CODES)},
        "vq_config": {"num_embeddings": 16, "latent_channels": 16, "resolution": 32, **_VQ},
    },
    "emu3": {
        "vocabulary_map": {"<image>": IMAGE, "<|extra_200|>": VIDEO}
        | {f"<|visual token {index:06d}|>": code for index, code in enumerate(CODES)},
        "vq_config": {"codebook_size": 16, "latent_channels": 8, "attn_resolutions": [], **_VQ},
    },
    "fast_vlm": {"vision_config": _SIGLIP},
    "instructblip": {"num_query_tokens": 16, "text_config": {"model_type": "llama"}},
    "instructblipvideo": {"num_query_tokens": 4, "text_config": {"model_type": "llama"}},
    "kosmos-2": {"latent_query_num": 16},
    "kosmos-2.5": {"latent_query_num": 16},
    "perception_lm": {"vision_config": {**_SIGLIP, "model_args": {"embed_dim": 64}}},
}
"""Arguments of the configuration class, where its defaults cannot be built."""

ADJUSTED: Mapping[str, Mapping[str, Any]] = {
    "apertus1p5": {
        "vision_config.codebook_size": 32,
        "audio_config.codebook_size": 32,
        "image_token_offset": 32,
        "audio_token_offset": 64,
    },
    "blip-2": _QFORMER,
    "cohere_compass": {
        "text_config.rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}
    },
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense"] * 3,
        "text_config.num_experts_per_tok": 2,
    },
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [3, 3, 2]},
    "glm4v_moe": {"text_config.rope_parameters.mrope_section": [1, 1, 2]},
    "glm5_next": {"text_config.num_key_value_heads": 4},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1, 1, 2, 2],
    },
    "hunyuan_vl": {"text_config.head_dim": 16},
    "instructblip": _QFORMER,
    "instructblipvideo": {**_QFORMER, "video_token_index": VIDEO},
    "kimi_k25": {"text_config.num_key_value_heads": 4},
    "mistral4": {"num_key_value_heads": 4},
    "mllama": {
        "vision_config.image_size": 28,
        "vision_config.patch_size": 14,
        "vision_config.intermediate_layers_indices": [0, 1],
        "vision_config.vision_output_dim": 192,
    },
    "mistral_large4": {"text_config.num_key_value_heads": 4},
    "molmo2": {"adapter_config.vision_feature_layer": [2, 1]},
    "ovis2": {"visual_indicator_token_ids": [11, 21]},
    "phi4_multimodal": {
        "vision_config.image_size": 56,
        "vision_config.patch_size": 14,
        "vision_config.crop_size": 56,
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": VISION_START},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": VISION_START},
    "step3p7": {"text_config.sliding_window": 8},
}
"""Fields to set after everything was made small, by dotted path."""

NOT_BUILT: Mapping[str, str] = {
    "diffusion_gemma": "not measured: it writes by diffusion of blocks, not token after token",
    "dots3_note": "not measured: no tiny model could be built, its layers differ in their heads",
    "gemma3n": "not measured: its vision tower needs the timm package",
    "inkling_mm_model": "not measured: its vision tower needs the scipy package",
    "pi0": "not measured: it moves a robot and writes no text",
    "qwen4_exp": "not measured: its default configuration lacks most sizes",
}
"""Types without a tiny model, and why."""
