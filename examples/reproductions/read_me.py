"""Read-ME: a dense model cut into one subset of neurons per kind of text, against pruning it to the same width.

A dense model is trained with the preset's steps, then all but an eighth of its feed-forward channels are taken away
per token, and half as many steps tune what is left, in all arms alike; arms with a router spend a part of these on it.
The paper keeps half of the channels; a model as small as these hardly misses the other half (see the card).
"""

from functools import lru_cache
from typing import Any

import torch
from harness import Bench, Preset, Reproduction
from torch import nn


__all__ = ["REPRODUCTION"]

KEEP = 0.125
ROUNDS = 3
#: Highest learning rates of tuning, as parts of the preset's, and part of the steps that train the router; chosen on
#: another seed, see the card.
EXPERTS_RATE, ROUTER_RATE, ROUTER_SHARE = 0.5, 0.3, 1 / 6


class RandomRouter(nn.Module):
    """In the router's place: any expert, for any token, anew in every pass."""

    def __init__(self, num_experts: int):
        super().__init__()
        self.num_experts = num_experts

    def forward(self, input_ids: torch.Tensor, *args: Any) -> torch.Tensor:
        """`(B, S) -> (B, S, N)`."""
        return torch.rand(*input_ids.shape, self.num_experts, device=input_ids.device)


def trained_dense(bench: Bench) -> Any:
    """The dense model that all arms of a seed begin with."""
    dense = bench.dense_model()
    dense.load_state_dict(trained_weights(bench.preset, bench.seed))
    return dense


@lru_cache(maxsize=1)
def trained_weights(preset: Preset, seed: int) -> dict[str, torch.Tensor]:
    """Its weights; arms that run in one process after another train it once."""
    bench = Bench(preset, seed)
    dense = bench.dense_model()
    bench.train(dense)
    return dense.state_dict()


def tune(bench: Bench, model: Any, dense: Any = None) -> Any:
    """Half as many steps again, on further text; `dense` is there for arms that train a router."""
    from hf_moe.trainers import ReadMeTrainer, ReadMeTrainingArguments

    per_round = max(2, bench.preset.steps // 2 // ROUNDS)
    router_steps = 0 if dense is None else max(1, round(ROUTER_SHARE * per_round))
    return bench.train(
        model,
        steps=ROUNDS * per_round,
        data=bench.train_blocks.roll(-bench.preset.steps * bench.preset.batch_size, dims=0),
        trainer_class=ReadMeTrainer,
        trainer_options={"teacher": dense},
        arguments_class=ReadMeTrainingArguments,
        rounds=ROUNDS,
        router_steps=router_steps,
        expert_steps=per_round - router_steps,
        learning_rate=EXPERTS_RATE * bench.preset.learning_rate,
        router_learning_rate=ROUTER_RATE * bench.preset.learning_rate,
        trained_parts="all",
    )


def refactored(bench: Bench, dense: Any, domains: dict[str, Any] | None = None) -> Any:
    """The dense model with an expert per kind of text."""
    from hf_moe import convert_to_readme

    domains = bench.domains if domains is None else domains
    texts = {name: blocks[: bench.preset.scale(32, 256, tiny=2)] for name, blocks in domains.items()}
    model, _ = convert_to_readme(dense, texts, KEEP, check=False, seed=bench.seed)
    return model


def pruned_by_weights(bench: Bench) -> dict[str, float]:
    """The channels with the largest |W_g| |W_u| |W_d|, the same for every token."""
    from hf_moe.upcycling import channel_sets, locate_feed_forwards
    from hf_moe.upcycling.refactor_checkpoint import build_read_me, read_me_config

    dense, sets = trained_dense(bench), {}
    sites = locate_feed_forwards(dense)
    kept = round(KEEP * dense.config.intermediate_size)
    for site in sites:
        ffn = site.module
        with torch.no_grad():
            size = ffn.gate_proj.weight.norm(dim=1) * ffn.up_proj.weight.norm(dim=1) * ffn.down_proj.weight.norm(dim=0)
        sets[site.layer_idx] = channel_sets(size[None], kept)
    width = min(512, dense.config.hidden_size)
    router = {"router_hidden_size": width, "router_num_heads": 1, "router_layers": 1}  # without a choice to make
    config = read_me_config(dense, 1, [0] * len(sites), [kept] * len(sites), router)
    model = build_read_me(dense, config, sites, sets, bench.seed)
    tune(bench, model)
    return {"bits_per_byte": bench.evaluate(model)}


def pruned_by_activity(bench: Bench) -> dict[str, float]:
    """The channels that are most active on all kinds of text together, the same for every token."""
    dense = trained_dense(bench)
    mixed = bench.train_blocks[: bench.preset.scale(160, 1280, tiny=4)]
    model = refactored(bench, dense, {"all": mixed, "again": mixed})  # two experts that are the same: no choice
    tune(bench, model)
    return {"bits_per_byte": bench.evaluate(model)}


def random_experts(bench: Bench) -> dict[str, float]:
    """An expert per kind of text, but any of them for any token."""
    dense = trained_dense(bench)
    model = refactored(bench, dense)
    model.model.router = RandomRouter(model.config.num_experts)
    tune(bench, model)
    return {"bits_per_byte": bench.evaluate(model)}


def per_token_router(bench: Bench) -> dict[str, float]:
    """A router that sees the token alone: its attention is switched off."""
    dense = trained_dense(bench)
    model = refactored(bench, dense)
    for block in model.model.router.blocks:
        block.attention.requires_grad_(False)
        for parameter in block.attention.output.parameters():
            nn.init.zeros_(parameter)
    return routed(bench, model, dense)


def read_me(bench: Bench) -> dict[str, float]:
    """The paper's router, which sees all tokens so far."""
    dense = trained_dense(bench)
    return routed(bench, refactored(bench, dense), dense)


def routed(bench: Bench, model: Any, dense: Any) -> dict[str, float]:
    """Tunes router and experts by turns and looks at the decisions on held-out text: how often the router agrees with
    the channels the dense model uses, how often a token goes where the one before went, and how often an expert is
    there when a cache has place for two."""
    from hf_moe.offload import count_hits

    trainer = tune(bench, model, dense)
    agreement = [entry["router_agreement"] for entry in trainer.state.log_history if "router_agreement" in entry][-1]
    blocks = torch.cat(list(bench.held_out.values()))[:: bench.preset.scale(4, 4, tiny=8)]
    with torch.no_grad():
        experts = model.eval()(blocks.to(model.device), routing_only=True).router_logits.argmax(-1).cpu()  # (M, S)
    sequence = experts.flatten().tolist()
    return {
        "bits_per_byte": bench.evaluate(model),
        "agreement": agreement,
        "same_as_before": (experts[:, 1:] == experts[:, :-1]).float().mean().item(),
        "hits_lru": count_hits(sequence, 2) / len(sequence),
        "hits_belady": count_hits(sequence, 2, "belady") / len(sequence),
    }


REPRODUCTION = Reproduction(
    name="read_me",
    papers=("2410.19123",),
    claim="Experts made of a dense model's most active neurons per kind of text, with a router over the tokens so "
    "far, do better than the dense model pruned to the same active width; a router that sees one token does worse.",
    arms={
        "pruned by weights": pruned_by_weights,
        "pruned by activity": pruned_by_activity,
        "random experts": random_experts,
        "per-token router": per_token_router,
        "Read-ME": read_me,
    },
    baseline="pruned by activity",
)
