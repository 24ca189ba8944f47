"""Tiny models of every type in `hf_moe.models.MODEL_TYPES`, for the facts every decoder must satisfy.

A new type enters by its line in `MODEL_TYPES`; give it an entry in `SIZES` if the common sizes do not fit it.
"""

import contextlib

import torch
from torch import nn

import hf_moe
from hf_moe.models import MODEL_TYPES, config_class
from hf_moe.models.configuration import MoeConfigMixin
from hf_moe.routing import BaseRouter


__all__ = [
    "ENCODERS",
    "ENCODER_HEADS",
    "GPT2_LIKE",
    "HEADS",
    "TYPES",
    "VOCABULARY",
    "force_routers",
    "make_config",
    "make_inputs",
    "make_model",
    "model_class",
    "position_ids",
    "seeded",
]

# Types with a causal language model and a router in each MoE layer. Others have files of their own beside those that
# go through this list.
TYPES = sorted(
    t
    for t, (_, config) in MODEL_TYPES.items()
    if config.replace("Config", "ForCausalLM") in hf_moe.__all__ and issubclass(config_class(t), MoeConfigMixin)
)
HEADS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification")
ENCODERS = ("moe_bert", "moe_roberta")
ENCODER_HEADS = ("Model", "ForMaskedLM", *HEADS[2:], "ForQuestionAnswering")
VOCABULARY = 64

_LLAMA_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2_SIZES = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_inner": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# All of a head is rotated: of a quarter of 8 channels, dynamic rotary embeddings are not defined.
_STABLELM_SIZES = {**_LLAMA_SIZES, "qk_layernorm": True, "use_qkv_bias": True, "partial_rotary_factor": 1.0}
# MoE in every layer, two experts per token, whatever the type does by itself.
_EVERY_LAYER = {"moe_layers": "all", "num_experts_per_tok": 2}
_BERT_SIZES = {
    **{name: value for name, value in _LLAMA_SIZES.items() if name != "num_key_value_heads"},
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
SIZES = {
    **dict.fromkeys(ENCODERS, _BERT_SIZES),
    "dynamic_moe": {**_LLAMA_SIZES, **_EVERY_LAYER},
    "moe_gpt2": _GPT2_SIZES,
    "moe_qwen3": {**_LLAMA_SIZES, "head_dim": 8},
    "moe_stablelm": _STABLELM_SIZES,
    "pr_moe": {**_GPT2_SIZES, **_EVERY_LAYER, "expert_capacity_factor": None},
}
# Routers that add a loss of their own do without it, unless a test asks.
ROUTER_CONFIGS = {"dynamic_moe": {"entropy_coef": 0.0}}
#: Types with GPT-2's names: two-matrix experts with biases, one fused projection in attention.
GPT2_LIKE = ("moe_gpt2", "pr_moe")
_GPT2_NAMES = {"num_hidden_layers": "n_layer", "hidden_size": "n_embd", "intermediate_size": "n_inner"}
# What a common name is called by types that know it under another one.
NAMES = dict.fromkeys(GPT2_LIKE, _GPT2_NAMES)


@contextlib.contextmanager
def seeded(seed: int = 0):
    """The global random state inside, and what it was before afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def make_config(model_type: str, **changes):
    """Two MoE layers of four experts; weights are large enough for experts and attention to matter."""
    names = NAMES.get(model_type, {})
    changes = {names.get(name, name): value for name, value in changes.items()}
    sizes = SIZES.get(model_type, _LLAMA_SIZES)
    if model_type in ROUTER_CONFIGS and "router_type" not in changes:
        changes = {"router_config": dict(ROUTER_CONFIGS[model_type]), **changes}
    return config_class(model_type)(**{**sizes, "num_experts": 4, "initializer_range": 0.2, **changes})


def model_class(config, head: str = "ForCausalLM") -> type:
    """The class of a head for a config."""
    import transformers

    auto = transformers.AutoModel if head == "Model" else getattr(transformers, f"AutoModel{head}")
    return auto._model_mapping[type(config)]


def make_model(
    model_type: str, head: str = "ForCausalLM", seed: int = 0, implementation: dict | None = None, **changes
):
    """A random model in eval mode, the same weights each time; what starts at zero is random too.

    `implementation` goes to `_from_config`, e.g. `{"experts_implementation": "eager"}`.
    """
    config = make_config(model_type, **changes)
    with seeded(seed):
        model = model_class(config, head)._from_config(config, **(implementation or {}))
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in model.named_parameters():
        if not parameter.any():  # biases and maps of router states start at zero and would hide mistakes
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval()


def make_inputs(batch: int = 2, sequence: int = 8, padding: str | None = None, seed: int = 0) -> dict:
    """`input_ids` and `attention_mask`; with `padding` ("left" or "right") the first row is three tokens short."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (batch, sequence), generator=generator)
    mask = torch.ones_like(input_ids)
    if padding is not None:
        pads = slice(None, 3) if padding == "left" else slice(-3, None)
        mask[0, pads], input_ids[0, pads] = 0, 0
    return {"input_ids": input_ids, "attention_mask": mask}


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions counted from the first real token, as `generate` counts them."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def force_routers(model: nn.Module, **buffers) -> None:
    """Writes buffers of every router, e.g. `temperature=2.0`, as a schedule would."""
    for module in model.modules():
        if isinstance(module, BaseRouter):
            for name, value in buffers.items():
                getattr(module, name).fill_(value)
