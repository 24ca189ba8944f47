"""Tiny dense models in which every weight matters, and what tests of growth compare."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common.upcycling_toys import ids


SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def small_model(kind: str = "llama", **changes):
    """A language model of any growable family with random norms and biases, in eval mode."""
    cls = type(AutoConfig.for_model(kind))
    known = set(cls.__dataclass_fields__)
    sizes = {**{k: v for k, v in SIZES.items() if k in known}, **(GPT2 if kind == "gpt2" else {})}
    config = cls(**{**sizes, "tie_word_embeddings": False, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.2)
            else:
                torch.nn.init.normal_(parameter, mean=float("norm" in name or ".ln_" in name), std=0.3)
    return model.eval()


@torch.no_grad()
def grown_gap(model, other) -> float:
    """Largest difference of what two models return."""
    inputs = {"input_ids": ids(length=12)}
    return float((model(**inputs).logits - other(**inputs).logits).abs().max())


def gradients(grown) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Gradients of a unit and of its copy in a Llama of `SIZES` with twice the hidden size and the heads and 70
    channels: of a channel, of a query head, of the coordinates of the residual stream."""
    grown.train()
    grown(input_ids=ids(), labels=ids()).loss.backward()
    layer = grown.model.layers[0]
    up, query = layer.mlp.up_proj.weight.grad, layer.self_attn.q_proj.weight.grad.unflatten(0, (8, 8))
    embedding = grown.model.embed_tokens.weight.grad
    return [(up[:22], up[48:]), (query[0], query[2]), (embedding[:, :32], embedding[:, 32:])]
