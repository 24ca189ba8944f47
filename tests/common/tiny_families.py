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
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 4, "rope_theta": 1e4},
    },
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "o_groups": 2,
        "o_lora_rank": 4,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 2,
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "diffusion_gemma_text": {"top_k_experts": 2},
    "doge": {"is_moe": True},
    "dots3_note_text": {"layer_types": ["full_attention"] * 4},
    "ernie4_5_moe": {"moe_k": 2},
    "ernie4_5_vl_moe_text": {
        "moe_k": 2,
        "moe_intermediate_size": [16, 8],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "top_k_experts": 2,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 384,
    },
    "glm4v_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}},
    "glm5_next_text": {
        "index_kpool": 2,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "hc_mult": 2,
        "qk_rope_head_dim": 0,
    },
    "inkling2_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 8},
    "inkling_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 8},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["full_attention"] * 4},
    "longcat_flash": {
        "num_layers": 2,
        "ffn_hidden_size": 32,
        "expert_ffn_hidden_size": 16,
        "zero_expert_num": 2,
        "head_dim": 4,
    },
    "mimo_v2_flash": {"head_dim": 24, "num_key_value_heads": 2},
    "moe_gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "muse_spark_text": {"moe_hidden_size": 16},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 16},
    "qwen4_exp_text": {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "hc_count": 2,
        "hc_lowrank": 8,
    },
    "step3p7_text": {"share_expert_dim": 16, "sliding_window": 8},
    "switch_transformers": {"d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 4},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
# Text models inside larger ones, which no auto class makes.
CLASSES = {
    "deepseek_ocr2_text": "DeepseekOcr2TextModel",
    "diffusion_gemma_text": "DiffusionGemmaEncoderTextModel",
    "ernie4_5_vl_moe_text": "Ernie4_5_VLMoeTextModel",
    "qwen3_omni_moe_talker_text": "Qwen3OmniMoeTalkerModel",
    "qwen3_omni_moe_text": "Qwen3OmniMoeThinkerTextModel",
    "step3p7_text": "Step3p7TextModel",
    "unlimited_ocr_text": "UnlimitedOcrTextModel",
}

OWN_FAMILIES = ("moe_gpt2", "moe_llama", "moe_qwen2", "moe_qwen3")  # moe_plus_plus has zero-computation experts

FAMILIES = (
    "afmoe",
    "aria_text",
    "axk1",
    "axk2",
    "bailing_hybrid",
    "beam",
    "cohere2_moe",
    "deepseek_ocr2_text",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "diffusion_gemma_text",
    "dots1",
    "dots3_note_text",
    "ernie4_5_moe",
    "ernie4_5_vl_moe_text",
    "exaone_moe",
    "flex_olmo",
    "flint",
    "gemma4_text",
    "glm4_moe",
    "glm4_moe_lite",
    "glm4v_moe_text",
    "glm5_next_text",
    "glm_moe_dsa",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "hy_v3",
    "hy_v4",
    "inkling2_text",
    "inkling_text",
    "jamba",
    "kimi_linear",
    "kolibri1",
    "laguna",
    "lfm2_moe",
    "llama4_text",
    "longcat_flash",
    "mellum",
    "mimo_v2_flash",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl_text",
    "mistral4",
    "mistral_large4_text",
    "mixtral",
    "muse_spark_text",
    "nemotron_h",
    "olmoe",
    "openai_privacy_filter",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_omni_moe_talker_text",
    "qwen3_omni_moe_text",
    "qwen3_vl_moe_text",
    "qwen4_exp_text",
    "solar_open",
    "step3p7_text",
    "switch_transformers",
    "unlimited_ocr_text",
    "zaya",
)


def tiny_model(model_type: str, **overrides):
    """A random model of `model_type` in eval mode, the same weights each time; a language model where there is one."""
    import transformers
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    import hf_moe  # noqa: F401  makes our types known

    if model_type in CLASSES:
        model_class = getattr(transformers, CLASSES[model_type])
        config_class = model_class.config_class
    else:
        config_class = type(CONFIG_MAPPING[model_type]())  # ours are announced by a stand-in until one is made
        mapping = MODEL_FOR_CAUSAL_LM_MAPPING if config_class in MODEL_FOR_CAUSAL_LM_MAPPING else MODEL_MAPPING
        model_class = mapping[config_class]
    known = set(config_class.__dataclass_fields__)
    sizes = {name: value for name, value in SIZES.items() if name in known}
    config = config_class(**{**sizes, **OWN_SIZES.get(model_type, {}), **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).eval()
        if model_type == "qwen3_omni_moe_talker_text":  # transformers leaves its experts as the memory was
            for name, parameter in model.named_parameters():
                if ".experts." in name:
                    torch.nn.init.normal_(parameter, std=0.02)
    return model


def tiny_inputs(model, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """`input_ids` as the arguments of `model`."""
    if model.config.is_encoder_decoder:
        return {"input_ids": input_ids, "decoder_input_ids": input_ids}
    if hasattr(model, "codec_embedding"):  # a talker: it has no ids of its own
        return {"inputs_embeds": model.codec_embedding(input_ids)}
    return {"input_ids": input_ids}
