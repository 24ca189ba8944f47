"""Config, weights and report of a dense model that becomes `read_me`.

Shapes: N experts, D hidden, I channels of the dense feed-forward.
"""

import copy
from dataclasses import fields
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedModel

from .channel_sets import ChannelSets
from .feed_forward import FeedForwardSite, extract_feed_forward
from .report import UpcycleReport, count_parameters


__all__ = ["build_read_me", "read_me_config", "read_me_provenance", "read_me_report"]

NOT_CARRIED = ("transformers_version", "architectures", "auto_map", "quantization_config", "_name_or_path")


def read_me_config(
    model: PreTrainedModel, num_experts: int, expert_sizes: list[int], shared_sizes: list[int], router: dict[str, int]
) -> Any:
    """The result's config.

    Args:
        model (`PreTrainedModel`): Dense model.
        num_experts (`int`): N.
        expert_sizes, shared_sizes (`list[int]`): Channels per layer.
        router (`dict[str, int]`): Sizes of the router.

    Returns:
        [`~hf_moe.ReadMeConfig`]

    Raises:
        ValueError: sizes that do not fit together.
    """
    from hf_moe.models.read_me import ReadMeConfig

    source: Any = model.config
    names = [field.name for field in fields(LlamaConfig) if field.name not in NOT_CARRIED]  # type: ignore[arg-type]
    carried = {name: copy.deepcopy(getattr(source, name)) for name in names if hasattr(source, name)}
    if source.model_type == "qwen2":
        carried["attention_bias"] = True  # on queries, keys and values; that of the output is written as zeros
    return ReadMeConfig(
        **{
            **carried,
            "num_experts": num_experts,
            "expert_sizes": expert_sizes,
            "shared_sizes": shared_sizes,
            **router,
        }
    )


def build_read_me(
    model: PreTrainedModel, config: Any, sites: list[FeedForwardSite], sets: dict[int, ChannelSets], seed: int
) -> PreTrainedModel:
    """The result, which shares no memory with the dense model.

    Args:
        model (`PreTrainedModel`): Dense model.
        config ([`~hf_moe.ReadMeConfig`]): From `read_me_config`.
        sites (`list[FeedForwardSite]`): Its feed-forwards.
        sets (`dict[int, ChannelSets]`): Their channels by layer.
        seed (`int`): Of the router's random weights.

    Returns:
        `ReadMeForCausalLM`: In evaluation mode.

    Raises:
        ValueError: weights are left over, or missing.
    """
    from hf_moe.models.read_me import ReadMeForCausalLM

    replaced = tuple(f"{site.name}." for site in sites)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    entries = {
        name: tensor.detach().clone()  # loading keeps the very tensors it is given
        for name, tensor in model.state_dict().items()
        if not name.startswith(replaced) and name not in tied
    }
    for site in sites:
        entries |= _layer_tensors(site, sets[site.layer_idx], config)
        if model.config.model_type == "qwen2":
            bias = entries[f"{site.layer_name}.self_attn.q_proj.bias"]
            entries[f"{site.layer_name}.self_attn.o_proj.bias"] = bias.new_zeros(config.hidden_size)
    entries |= _router_tensors(model, config, seed)
    moe, info = ReadMeForCausalLM.from_pretrained(
        None, config=config, state_dict=entries, dtype=model.dtype, output_loading_info=True
    )
    problems = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    if problems:
        raise ValueError(f"{type(model).__name__} does not fit {type(moe).__name__}: {problems[:4]} do not match.")
    moe.config.name_or_path = ""  # it was loaded from no path, which transformers writes down as "None"
    if getattr(model, "generation_config", None) is not None:
        moe.generation_config = copy.deepcopy(model.generation_config)
    return moe.to(model.device).eval()


def _router_tensors(model: PreTrainedModel, config: Any, seed: int) -> dict[str, torch.Tensor]:
    """The first columns of the embedding; N(0, initializer_range^2) for matrices, 0 for biases, 1 for norms."""
    from hf_moe.models.read_me import ReadMeRouter

    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in ReadMeRouter(config).named_parameters()}
    prefix, std, entries = "model.router.", config.initializer_range, {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            entries[prefix + name] = std * torch.randn(shape, generator=generator)
        else:
            entries[prefix + name] = torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
    embedding: Any = model.get_input_embeddings()
    columns = embedding.weight.detach()[:, : config.router_hidden_size]
    entries[f"{prefix}embed_tokens.weight"] = columns.float().clone()
    return entries


def _layer_tensors(site: FeedForwardSite, sets: ChannelSets, config: Any) -> dict[str, torch.Tensor]:
    ffn = extract_feed_forward(site.module, activation=config.hidden_act)
    device = ffn.up.device
    entries = {f"{site.name}.channel_masks": sets.masks.to(device)}
    if len(sets.shared):
        shared = ffn.channels(sets.shared)
        for part in ("gate", "up", "down"):
            entries[f"{site.name}.shared.{part}_proj.weight"] = getattr(shared, part).clone()
    if sets.expert_size:
        entries[f"{site.name}.gate.temperature"] = torch.ones(())
        experts = [ffn.channels(index) for index in sets.experts]
        entries[f"{site.name}.experts.gate_up_proj"] = torch.stack([expert.gate_up for expert in experts])
        entries[f"{site.name}.experts.down_proj"] = torch.stack([expert.down for expert in experts])
    return entries


def read_me_report(
    model: PreTrainedModel,
    moe: PreTrainedModel,
    name: str,
    sites: list[FeedForwardSite],
    sets: dict[int, ChannelSets],
    domains: list[str],
    keep: float,
    seed: int,
) -> UpcycleReport:
    """What is known about the result without running it."""
    exact = all(bool(s.masks.all()) for s in sets.values())
    parameters, num_bytes = count_parameters(moe)
    width = moe.config.hidden_size
    idle = sum((len(domains) - 1) * 3 * width * s.expert_size for s in sets.values())
    router = moe.config.router_hidden_size
    return UpcycleReport(
        source=name,
        target="read_me",
        architecture=type(moe).__name__,
        num_experts=len(domains),
        num_experts_per_tok=1,
        num_layers=len(sites),
        predicted_exact=exact,
        reason="every expert keeps all channels" if exact else "every expert keeps only part of the channels",
        scale=1.0,
        recipe={
            "experts": {"name": "Masks", "keep": keep, "domains": domains},
            "router": {"name": "ReadMeRouter", "hidden_size": router, "layers": moe.config.router_layers},
            "shared": "the channels all domains keep",
            "weights": "one expert, weight 1",
        },
        seed=seed,
        dense_parameters=count_parameters(model)[0],
        parameters=parameters,
        active_parameters=parameters - idle,
        num_bytes=num_bytes,
        layers=[
            {
                "layer": site.layer_idx,
                "module": site.name,
                "expert_width": sets[site.layer_idx].expert_size,
                "shared_width": len(sets[site.layer_idx].shared),
                "scale": 1.0,
            }
            for site in sites
        ],
    )


def read_me_provenance(report: UpcycleReport, model: PreTrainedModel, tokens: dict[str, int]) -> dict[str, Any]:
    """What the result's config records."""
    from hf_moe import __version__

    return {
        "source": report.source,
        "source_model_type": model.config.model_type,
        "num_experts": report.num_experts,
        "num_experts_per_tok": 1,
        "layers": [entry["layer"] for entry in report.layers],
        **report.recipe,
        "scale": 1.0,
        "seed": report.seed,
        "predicted_exact": report.predicted_exact,
        "reason": report.reason,
        "calibration_tokens": tokens,
        "target": report.target,
        "hf_moe_version": __version__,
    }
