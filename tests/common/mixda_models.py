"""Tiny models with feed-forward networks for the tests of MixDA."""

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)


__all__ = ["FAMILIES", "IDS", "MASK", "perturb", "saved_domain", "tiny"]

IDS = torch.tensor([[5, 6, 7, 8, 11, 12], [9, 3, 2, 1, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])

_SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_SIZES |= {"num_attention_heads": 4, "pad_token_id": 1}
_T5 = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}

FAMILIES = {
    "bert": (BertForMaskedLM, lambda: BertConfig(**_SIZES)),
    "bert_labels": (BertForSequenceClassification, lambda: BertConfig(**_SIZES, num_labels=3)),
    "roberta": (RobertaForMaskedLM, lambda: RobertaConfig(**_SIZES, max_position_embeddings=40)),
    "llama": (LlamaForCausalLM, lambda: LlamaConfig(**_SIZES, num_key_value_heads=2)),
    "gpt2": (GPT2LMHeadModel, lambda: GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_inner=48)),
    "opt": (OPTForCausalLM, lambda: OPTConfig(
        vocab_size=64, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
    )),
    "t5": (T5ForConditionalGeneration, lambda: T5Config(**_T5, decoder_start_token_id=0)),
}  # fmt: skip


def tiny(family: str, seed: int = 0):
    """A model of two layers, in evaluation mode; the same seed gives the same backbone under every head."""
    model_class, config = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(config()).eval()


@torch.no_grad()
def perturb(model, container: str = "", seed: int = 0):
    """Draws the weights of an adapter's container, of all by default, as training would have changed them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f"hfmoe_mixda_{container}" in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def saved_domain(folder, family: str = "bert", domain: str = "domain", seed: int = 0, **fields):
    """Saves a first-stage adapter with random weights.

    Returns:
        `tuple`: The folder as a string, and the model.
    """
    from peft import get_peft_model

    from hf_moe import MixdaConfig

    fields = {"domain_layers": [0, 1], "reduction": 8} | fields
    model = perturb(get_peft_model(tiny(family), MixdaConfig(domains=[domain], **fields)), seed=seed).eval()
    model.save_pretrained(folder)
    return str(folder), model
