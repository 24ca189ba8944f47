"""Toy feed-forwards, a reference evaluation of a MoE layer, and tiny dense models whose feed-forwards matter.

Shapes: T tokens, D hidden, I intermediate, N experts, K per token.
"""

import torch

from hf_moe.upcycling.feed_forward import DenseFeedForward


D, I, T = 16, 24, 12  # noqa: E741


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def toy_ffn(seed: int = 0, hidden: int = D, width: int = I, gated: bool = True, biased: bool = False):
    """A random feed-forward, SwiGLU by default; GELU without a gate."""
    g = generator(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g) / shape[-1] ** 0.5

    return DenseFeedForward(
        up=rand(width, hidden),
        down=rand(hidden, width),
        activation="silu" if gated else "gelu_new",
        gate=rand(width, hidden) if gated else None,
        gate_bias=rand(width) if gated and biased else None,
        up_bias=rand(width) if biased else None,
        down_bias=rand(hidden) if biased else None,
    )


def tokens(seed: int = 1, count: int = T, hidden: int = D) -> torch.Tensor:
    return torch.randn(count, hidden, generator=generator(seed))


def mix(experts, weights: torch.Tensor, index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y_t = sum_k w_tk E_(index_tk)(x_t), written out."""
    outputs = torch.stack([expert(x) for expert in experts], dim=1)  # (T, N, D)
    chosen = outputs.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))  # (T, K, D)
    return (weights.unsqueeze(-1) * chosen).sum(dim=1)


def moe(builder, ffn, rule, router, top_k: int, num_experts: int, x: torch.Tensor, scale=None, stats=None):
    """The layer a recipe gives, scale folded in, evaluated on `x`; the recipe's own scale by default."""
    rows = router.build(num_experts, ffn.hidden_size, stats, generator(2))
    prediction = builder.exactness(rule, top_k, num_experts, router)
    scale = prediction.scale if scale is None else scale
    experts = builder.build(ffn, num_experts, stats, generator(3))
    experts = [builder.fold_scale(expert, scale) for expert in experts]
    weights, index = rule.apply(x @ rows.T, top_k)
    return mix(experts, weights, index, x), prediction


def _configs():
    from transformers import (
        GPT2Config,
        GPTNeoXConfig,
        GraniteConfig,
        LlamaConfig,
        MistralConfig,
        Olmo2Config,
        PhiConfig,
        Qwen2Config,
        Qwen3Config,
        StableLmConfig,
    )

    sizes = dict(
        vocab_size=96,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    grouped = dict(sizes, num_key_value_heads=2)
    gpt2 = dict(vocab_size=96, n_embd=16, n_layer=2, n_head=4, n_positions=64, n_inner=32, pad_token_id=0)
    return {
        "llama": lambda **k: LlamaConfig(**{**grouped, "tie_word_embeddings": True, **k}),
        "mistral": lambda **k: MistralConfig(**{**grouped, "sliding_window": None, **k}),
        "qwen2": lambda **k: Qwen2Config(**{**grouped, **k}),
        "qwen3": lambda **k: Qwen3Config(**{**grouped, "head_dim": 4, **k}),
        "granite": lambda **k: GraniteConfig(
            **{**grouped, "residual_multiplier": 0.7, "logits_scaling": 2.0, "attention_multiplier": 0.3, **k}
        ),
        "olmo2": lambda **k: Olmo2Config(**{**grouped, **k}),
        "gpt2": lambda **k: GPT2Config(**{**gpt2, "bos_token_id": 1, "eos_token_id": 2, **k}),
        "gpt_neox": lambda **k: GPTNeoXConfig(**{**sizes, **k}),
        "phi": lambda **k: PhiConfig(**{**sizes, **k}),
        "stablelm": lambda **k: StableLmConfig(**{**grouped, **k}),
    }


def tiny_dense(kind: str, seed: int = 0, auto: str = "AutoModelForCausalLM", **changes):
    """A tiny dense model; weights are large enough that a wrong feed-forward shows in the logits."""
    import transformers

    config = _configs()[kind](**changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, auto).from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def ids(seed: int = 0, batch: int = 2, length: int = 10, vocab: int = 96) -> torch.Tensor:
    return torch.randint(3, vocab, (batch, length), generator=generator(seed))


@torch.no_grad()
def logit_gap(a, b, input_ids=None) -> float:
    input_ids = ids() if input_ids is None else input_ids
    return float((a(input_ids=input_ids).logits - b(input_ids=input_ids).logits).abs().max())
