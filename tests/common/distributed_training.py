"""Run by `trainers/test_distributed_training.py` in two processes: trains tiny models, saves how each rank ends."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from common.tiny_training import (
    SIZES,
    arguments,
    build,
    completions,
    expert_lora,
    tiny_moe,
    tiny_words,
    token_rows,
)
from hf_moe import MoeT5Config, MoeT5ForConditionalGeneration
from hf_moe.trainers import (
    DenoisingCollator,
    MoEDistillationConfig,
    MoEDistillationTrainer,
    MoeSeq2SeqTrainer,
    MoeSeq2SeqTrainingArguments,
    StagedDistillationConfig,
    StagedDistillationTrainer,
)
from hf_moe.views import unwrap_model


# name -> kind of trainer, model family, LoRA, options
CASES = {
    "trainer-running": ("trainer", "moe_llama", False, {"balance_mode": "running"}),
    "trainer-lagged": ("trainer", "moe_plus_plus", False, {"balance_mode": "lagged"}),
    "trainer-blend-mean-of-means": (
        "trainer",
        "moe_llama",
        False,
        {"balance_mode": "blend", "average_tokens_across_devices": False},
    ),
    "sft-running": ("sft", "moe_plus_plus", False, {"balance_mode": "running"}),
    "sft-lagged-lora": ("sft", "moe_llama", True, {"balance_mode": "lagged", "activation_checkpointing": True}),
    "distillation-running": (
        "distillation",
        "moe_llama",
        False,
        {"balance_mode": "running", "distillation_weight": 3.0, "prediction_weight": 0.5},
    ),
    "staged-running": (
        "staged",
        "moe_llama",
        False,
        {"balance_mode": "running", "kd_weight": 3.0, "kd_temperature": 2.0, "kd_stop_step": 2},
    ),
    "seq2seq-running": ("seq2seq", "moe_t5", False, {"balance_mode": "running"}),
    "dpo-lagged-lora": ("dpo", "moe_llama", True, {"balance_mode": "lagged"}),
}


class SpecialTokens:
    """What a collator asks of a tokenizer."""

    pad_token_id, eos_token_id = 0, 2


def tiny_t5(**config) -> MoeT5ForConditionalGeneration:
    sizes = {"vocab_size": SIZES["vocab_size"], "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {"num_experts": 4, "dropout_rate": 0.0, "decoder_start_token_id": 0, **config}
        return MoeT5ForConditionalGeneration(MoeT5Config(**sizes, **options))


def pairs(count: int) -> list[dict]:
    """Sources and targets whose lengths have nothing to do with each other."""
    g = torch.Generator().manual_seed(3)
    lengths = [(3 + i % 5, 2 + (3 * i) % 7) for i in range(count)]
    return [
        {
            name: torch.randint(3, 90, (n,), generator=g).tolist()
            for name, n in zip(("input_ids", "labels"), both, strict=True)
        }
        for both in lengths
    ]


def train(name: str, folder: Path, batch_size: int) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Three steps of two micro-batches; where `lagged` does not forbid it, the last one is an epoch's last, with one.

    Returns:
        `tuple`: Weights and balance buffers by name; the logs of the steps.
    """
    kind, family, lora, options = CASES[name]
    # Capacity is per micro-batch, so it would depend on its size.
    config = {"router_z_loss_coef": 0.01, "expert_capacity_factor": None, "router_aux_loss_coef": 1.0}
    if not lora and family in ("moe_llama", "moe_t5"):
        config |= {"router_type": "sigmoid_topk", "router_bias_update_speed": 0.01}
    adapter = expert_lora(target_modules=["q_proj"], init_lora_weights=False) if lora else None
    model = tiny_t5(**config) if kind == "seq2seq" else tiny_moe(family, **config)
    data = 20
    if options["balance_mode"] == "lagged":
        # Without a previous step, and where one micro-batch on one rank is the step, `lagged` uses its own counts.
        data = 24
        balancer = model.base_model.load_balancer
        balancer.previous_counts.copy_(torch.arange(balancer.counts.numel()).view_as(balancer.counts))
        balancer.previous_num_tokens.fill_(1)
    elif "average_tokens_across_devices" in options:
        # Means over ranks of means are the mean where every row has as many labels.
        data = token_rows(20, pad=False)
    torch.manual_seed(0)
    options = {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": 0.1,
        **options,
    }
    if kind == "distillation":
        sizes = {name: value for name, value in SIZES.items() if name in LlamaConfig().to_dict()}
        with torch.random.fork_rng():
            torch.manual_seed(9)
            teacher = LlamaForCausalLM(LlamaConfig(**sizes))
        args = arguments(MoEDistillationConfig, folder, **options)
        trainer = MoEDistillationTrainer(model, args, teacher_model=teacher, train_dataset=token_rows(data))
    elif kind == "staged":
        args = arguments(StagedDistillationConfig, folder, **options)
        more = {"train_dataset": completions(data), "processing_class": tiny_words()}
        trainer = StagedDistillationTrainer(model, args, teacher_model=tiny_moe(seed=9), **more)
    elif kind == "seq2seq":
        args = arguments(MoeSeq2SeqTrainingArguments, folder, remove_unused_columns=False, **options)
        collator = DenoisingCollator(SpecialTokens(), sentinels=[100])
        trainer = MoeSeq2SeqTrainer(model, args, train_dataset=pairs(data), data_collator=collator)
    else:
        trainer = build(kind, folder, model, data=data, lora=adapter, watch=False, **options)
    trainer.train()
    model = unwrap_model(trainer.model)
    state = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    state |= {name: tensor.clone() for name, tensor in model.named_buffers()}
    return state, [log for log in trainer.state.log_history if "loss" in log]


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    logs = {"world_size": dist.get_world_size()}
    for name in CASES:
        state, logs[name] = train(name, folder / name, batch_size=2)
        save_file({key: value.contiguous() for key, value in state.items()}, folder / f"{name}-{rank}.safetensors")
    (folder / f"rank{rank}.json").write_text(json.dumps(logs))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
