"""Tiny random models of every causal-LM architecture in transformers.

A config class is shrunk by its field names: a few names mean the same in almost all classes. `OVERRIDES` has what an
architecture needs beyond that. Weights are large enough that steering changes tokens.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto


VOCAB = 99
LAYERS = 4
MOST_PARAMETERS = 8_000_000
WIDTH_OF_WEIGHTS = 0.15

# Small values of config fields, by name.
SMALL: dict[str, Any] = {
    # widths
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "dim", "emb_dim"), 32
    ),
    **dict.fromkeys(("embed_dim", "lru_width", "attention_hidden_size", "backbone_hidden_size", "embedding_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_inner", "dff", "dim_ff"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "shared_intermediate_size", "feed_forward_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size", "prefix_dense_intermediate_size"), 32),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    # depth
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), LAYERS
    ),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "num_blocks"), LAYERS),
    # heads
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "swa_head_dim", "dim_head", "kv_channels", "d_head"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    "qk_head_dim": 16,
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts"), 1),
    "first_k_dense_replace": 1,
    # state spaces and linear attention
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    "n_groups": 1,
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    # sequences
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "context_length"), 128),
    # vision and audio towers
    **dict.fromkeys(("depth", "num_layers_vision", "audio_layers"), 2),
    **dict.fromkeys(("out_hidden_size", "text_hidden_size", "vision_output_dim", "projector_output_dim"), 32),
    "projector_input_dim": 32,
    "image_size": 32,
    "patch_size": 8,
    # tokens
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "is_decoder": True,
    # dropout is off in evaluation, but layer drop is not always
    "layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}

# Latent attention needs one key-value head for each query head, whatever the config's default.
LATENT = {"num_key_value_heads": 4}

# Rotary positions in three sections, whose sum is half a head.
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}

# Ids of tokens that some models look for in the prompt; no test prompt contains them.
SPECIAL_TOKENS = {"vision_start_token_id": VOCAB - 2, "audio_start_token_id": VOCAB - 1}

# What an architecture needs beyond `SMALL`, by the model type of its config.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "chameleon": {"vocabulary_map": {"<image>": 98}},
    "chameleon_vqgan": {"latent_channels": 32, "base_channels": 32, "channel_multiplier": [1, 1], "embed_dim": 32},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "cosmos3_edge_text": {"rope_parameters": MROPE},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"] * 2},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 8},
    "dots3_note_vision_encoder": {"pyramid_num_routed": [-1] * 4, "adapter_in_dim": 32, "adapter_out_dim": 32},
    "dots3_note_text": {"use_sliding_window": False},
    "emu3": {"vocabulary_map": {"<image>": 98, "<|extra_200|>": 97}},
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "attn_resolutions": []},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [32, 32],
        "rope_parameters": {**MROPE, "mrope_section": [1, 1, 2]},
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"hidden_size_per_layer_input": 8},
    "glm4v_moe_text": {"rope_parameters": {**MROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}},
    "glm4v_text": {"rope_parameters": MROPE},
    "glm5_next": {"qk_rope_head_dim": 0},
    "glm5_next_text": {"qk_rope_head_dim": 0, "linear_num_heads": 4, "linear_head_dim": 8},
    "glm_ocr_text": {"rope_parameters": MROPE},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 4},
    "granite4_vision": {
        **{"deepstack_layer_map": [[0, 1]], "downsample_rate": "1/2"},
        "vision_config": {"hidden_size": 64},
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "hunyuan_vl_text": {"rope_parameters": MROPE},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "janus_vision_model": {"projection_dim": 32},
    "janus_vqgan": {
        **{"projection_dim": 32, "image_token_embed_dim": 32, "num_embeddings": 32},
        **{"latent_channels": 32, "base_channels": 32, "channel_multiplier": [1, 1]},
    },
    "kimi_linear": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"head_dim": 16},
    "molmo2_adapter": {"vision_feature_layer": [3, 2]},
    "molmo2_vision": {"image_size": [32, 32]},
    "muse_glimmer": {"projector_hidden_size": 32},
    "muse_spark": {"projector_hidden_size": 32},
    "muse_spark_audio": {"hidden_sizes": [8, 8, 16, 32], "depths": [1, 1, 1, 1]},
    "muse_spark_text": {"moe_hidden_size": 32},
    "nemotron_h_omni": {
        "projector_hidden_size": 32,
        "vision_config": {"video_temporal_patch_size": 2, "max_img_size": 64},
    },
    "paddleocr_vl_text": {"rope_parameters": MROPE},
    "qwen2_5_omni_text": {"rope_parameters": MROPE},
    "qwen2_5_omni_thinker": SPECIAL_TOKENS,
    "qwen2_5_vl_text": {"rope_parameters": MROPE},
    "qwen2_vl_text": {"rope_parameters": MROPE},
    "step3p5": {"sliding_window": 8},
    "phi4_multimodal_audio": {
        "ext_pw_out_channel": 32,
        "depthwise_separable_out_channel": 32,
        "nemo_conv_channels": 8,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "qwen3_omni_moe_text": {"rope_parameters": MROPE},
    "qwen3_omni_moe_thinker": SPECIAL_TOKENS,
    "reformer": {"axial_pos_embds": False},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


def architectures() -> dict[str, tuple[str, ...]]:
    """Names of transformers' classes that generate text, each with its model types."""
    types: dict[str, tuple[str, ...]] = {}
    for mapping in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ):
        for model_type, class_name in mapping.items():
            known = types.get(class_name, ())
            types[class_name] = known if model_type in known else (*known, model_type)
    return types


def shrunk_kwargs(config_cls: type[PreTrainedConfig]) -> dict[str, Any]:
    """Arguments for a small config of a class, including sub-configs."""
    names = [name for name in inspect.signature(config_cls.__init__).parameters if name != "self"]
    kwargs = {name: SMALL[name] for name in names if name in SMALL}
    if "kv_lora_rank" in names and "num_key_value_heads" in names:
        kwargs.update(LATENT)
    if getattr(config_cls, "sub_configs", None):
        default = config_cls()
        for name in config_cls.sub_configs:
            part = getattr(default, name, None)
            if isinstance(part, PreTrainedConfig):
                small = merge(shrunk_kwargs(type(part)), OVERRIDES.get(part.model_type, {}))
                kwargs[name] = {"model_type": part.model_type, **small}
    return kwargs


def merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Merge a nested dict into another."""
    merged = dict(base)
    for key, value in extra.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(value, dict) and isinstance(old, dict) else value
    return merged


def tiny_config(config_cls: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A small config of a class."""
    return config_cls(**merge(shrunk_kwargs(config_cls), OVERRIDES.get(config_cls.model_type, {})))


def tiny_model(class_name: str, seed: int = 0) -> PreTrainedModel:
    """A small random model of a class, in evaluation mode; it never ends a text on its own.

    Raises:
        ValueError: if the config did not become small: the model would be too large for a test.
    """
    model_cls: Any = getattr(transformers, class_name)
    config = tiny_config(model_cls.config_class)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_cls(copy.deepcopy(config)).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{class_name} still has {size} parameters; give it smaller fields in OVERRIDES.")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = model_cls(config).eval()
        widen(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def widen(model: PreTrainedModel) -> None:
    """Redraw matrices with larger weights: at the usual 0.02 a random model says one word whatever the prompt."""
    for parameter in model.parameters():
        if parameter.ndim >= 2 and parameter.is_floating_point() and parameter.std() < WIDTH_OF_WEIGHTS / 2:
            parameter.normal_(std=WIDTH_OF_WEIGHTS)
