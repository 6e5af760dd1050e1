"""What single families need beside the rules of `shrink`: sizes under names of their own, and layers of each kind."""

from typing import Any

GROUPED = {"num_key_value_heads": 2}
CONV = {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]}
SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]}
SCALED = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 2.0}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}
TOWER = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
"""Of images, and of sound."""

SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 16},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5},
    "cohere2_moe": {"logit_scale": 0.5},
    "cohere_compass_text": {**SLIDING, "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE}},
    "cpmant": {"dim_ff": 48, "dim_head": 16},
    "ctrl": {"dff": 48},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"] * 2,
        "o_groups": 2,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, **SLIDING},
    "gemma3n_text": {
        "intermediate_size": [48] * 4,
        **SLIDING,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        "altup_num_inputs": 2,
    },
    **dict.fromkeys(("granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared"), SCALED),
    "granitemoehybrid": {**SCALED, **LINEAR, "mamba_n_heads": 8, "mamba_d_head": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "inkling_text": {"logits_mup_width_multiplier": 2.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "kimi_linear": {**LINEAR, "linear_head_dim": 8, "linear_num_heads": 4},
    "laguna": SLIDING,
    "lfm2": CONV,
    "lfm2_moe": CONV,
    "llama": GROUPED,
    "longcat_flash": {"head_dim": 8, "expert_ffn_hidden_size": 48, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "time_step_rank": 8},
    "minicpm3": {"dim_model_base": 64},
    "mellum": SLIDING,
    "ministral": {"head_dim": 16},
    "nemotron": GROUPED,
    "phi4_multimodal": {"vision_config": TOWER, "audio_config": TOWER},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2, "layer_types": SLIDING["layer_types"]},
    "qwen3": GROUPED,
    "qwen4_exp_text": {
        "hc_lowrank": 8,
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"axial_pos_embds": False, "attention_head_size": 16, "feed_forward_size": 48, "hash_seed": 0},
    "roc_bert": {"pronunciation_embed_dim": 16, "shape_embed_dim": 16, "shape_vocab_size": 272},
    "xlm": {"emb_dim": 64, "causal": True},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_dt_rank": 8,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_headdim": 16,
    },
}
