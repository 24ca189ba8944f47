"""Tiny random language models of the MoE families, in-tree and ours, by model type."""

import torch


# Every family takes what it knows of this; the names differ from family to family.
SIZES = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # experts
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    # which layers have experts
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 0,
    "moe_layer_interval": 1,
    "decoder_sparse_step": 1,
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
    # attention and state-space layers
    "attn_layer_period": 1,
    "attn_layer_offset": 0,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_expand": 2,
}
OWN_SIZES = {
    "ernie4_5_moe": {"moe_k": 2},
    "moe_gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "lfm2_moe": {"layer_types": ["full_attention"] * 4},
    "mimo_v2_flash": {"head_dim": 24, "num_key_value_heads": 2},
}

OWN_FAMILIES = ("moe_gpt2", "moe_llama", "moe_qwen2", "moe_qwen3")  # moe_plus_plus has zero-computation experts

FAMILIES = (
    "afmoe",
    "aria_text",
    "bailing_hybrid",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "hy_v3",
    "jamba",
    "lfm2_moe",
    "mellum",
    "mimo_v2_flash",
    "minimax",
    "minimax_m2",
    "mistral4",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_vl_moe_text",
    "solar_open",
)


def tiny_model(model_type: str, **overrides):
    """A random model of `model_type` in eval mode, the same weights each time; a language model where there is one."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    import hf_moe  # noqa: F401  makes our types known

    config_class = type(CONFIG_MAPPING[model_type]())  # ours are announced by a stand-in until one is made
    known = set(config_class.__dataclass_fields__)
    sizes = {name: value for name, value in SIZES.items() if name in known}
    config = config_class(**{**sizes, **OWN_SIZES.get(model_type, {}), **overrides})
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING if config_class in MODEL_FOR_CAUSAL_LM_MAPPING else MODEL_MAPPING
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return mapping[config_class](config).eval()
