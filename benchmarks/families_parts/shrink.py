"""A tiny configuration of any family: its own defaults, with every size made small and every kind of layer kept."""

import re
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from families_parts.settings import SETTINGS

VOCABULARY = 272
PAD, END, BEGIN = 256, 258, 259
LAYERS = 4
HIDDEN = 64
WINDOW = 8
"""Prompts and responses are several times as long."""

SIZES: tuple[tuple[float, str], ...] = (
    (VOCABULARY, r"vocab_size vocab_size_per_layer_input"),
    (LAYERS, r"num_hidden_layers n_layers? num_layers decoder_layers num_decoder_layers"),
    (HIDDEN, r"hidden_size d_model n_embd dim embedding_size word_embed_proj_dim lru_width attention_hidden_size"),
    (48, r".*intermediate_size(_mlp)? .*ffn_(hidden_size|dim) n_inner d_ff"),
    (4, r"num_attention_heads n_heads? num_heads decoder_attention_heads num_decoder_attention_heads"),
    (2, r"num_key_value_heads num_kv_heads n_head_kv kv_n_heads"),
    (16, r"(global_|swa_|qk_nope_|nope_|v_|swa_v_|attention_|index_)?head_dim d_kv"),
    (8, r"qk_rope_head_dim rope_head_dim rotary_dim"),
    (24, r"qk_head_dim"),
    (8, r"linear_.*(key|value)_head_dim"),
    (2, r"linear_num_key_heads"),
    (4, r"linear_num_value_heads"),
    (16, r"(q|kv|o)_lora_rank laurel_rank adapter_rank index_n_heads"),
    (4, r"num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, r"num_experts_per_tok num_experts_per_token moe_topk top_k_experts moe_top_k moe_k"),
    (1, r"n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group num_expert_group"),
    (1, r"first_k_dense_replace num_dense_layers num_kv_shared_layers moe_layer_start_index max_window_layers"),
    (WINDOW, r".*sliding_window(_size)? window_size attention_chunk_size attention_window_size"),
    (4, r"index_topk index_topk_blocks index_block_size"),
    (8, r"(ssm_|mamba_)?(state_size|d_state|chunk_size) hidden_size_per_layer_input"),
    (512, r"max_position_embeddings n_positions n_ctx max_seq_len"),
    (1.0, r"attn_logit_softcapping attention_logit_cap"),
    (4.0, r"final_logit_softcapping"),
)
"""What keys become where their default is larger. The names are regular expressions."""
LAYER_COUNTS = SIZES[1][1]


def tiny_config(family: str) -> PreTrainedConfig:
    """The family's default configuration, shrunk; what cannot be shrunk by rule is in `SETTINGS`."""
    kind = CONFIG_MAPPING[family]
    given = SETTINGS.get(family, {})
    return kind(**(shrunk(kind()) | given))


def shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    """What is to be changed of a default configuration, those within it included."""
    default = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    changed = {key: small for key, value in default.items() if (small := small_value(key, value)) is not None}
    if default.get("num_key_value_heads", 0) == default.get("num_attention_heads"):
        changed["num_key_value_heads"] = changed["num_attention_heads"]
    if default.get("head_dim") == default.get("qk_rope_head_dim"):
        changed.pop("head_dim", None)
    changed |= layer_lists(default)
    for key, token in (("pad_token_id", PAD), ("bos_token_id", BEGIN), ("eos_token_id", END)):
        changed |= {key: token} if key in default else {}
    if "is_decoder" in default:
        changed["is_decoder"] = True  # BERT and its kin look to both sides without it
    for key in config.sub_configs:
        if isinstance(part := getattr(config, key), PreTrainedConfig):
            changed[key] = type(part)(**(shrunk(part) | SETTINGS.get(part.model_type, {})))
    return changed


def small_value(key: str, value: Any) -> Any:
    """A smaller value of a key, None to leave it as it is."""
    if isinstance(value, bool):
        return None
    if key.endswith(("token_id", "token_index")):
        return PAD + 4 if isinstance(value, int) and value >= VOCABULARY else None
    small = next((small for small, names in SIZES if named(key, names)), None)
    # A key without a value stands for another one, as heads of keys do for those of queries.
    return min(value, small) if small is not None and isinstance(value, int | float) else None


def named(key: str, names: str) -> bool:
    return any(re.fullmatch(name, key) for name in names.split())


def layer_lists(default: dict[str, Any]) -> dict[str, Any]:
    """Lists with an entry a layer, cut to a few layers in which each kind of layer occurs, in their order."""
    count = next((value for key, value in default.items() if named(key, LAYER_COUNTS)), None)
    lists = {key: value for key, value in default.items() if isinstance(value, list) and len(value) == count}
    if not lists:
        return {}
    columns = [repr(column) for column in zip(*lists.values(), strict=True)]
    kinds = list(dict.fromkeys(columns))
    chosen = sorted(columns.index(kind) for kind in kinds[:LAYERS])
    spare = [place for place in range(len(columns)) if place not in chosen]
    chosen = sorted([*chosen, *spare[: max(0, LAYERS - len(chosen))]])
    return {key: [value[place] for place in chosen] for key, value in lists.items()}
