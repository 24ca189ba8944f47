"""Tiny models of hf_moe, data and arguments for the trainer tests; no tokenizer file, no network."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_moe import MoeLlamaConfig, MoeLlamaForCausalLM, MoePlusPlusConfig, MoePlusPlusForCausalLM, upcycle
from hf_moe.routing.discovery import find_balancers
from hf_moe.trainers import (
    MoeDPOConfig,
    MoeDPOTrainer,
    MoeSFTConfig,
    MoeSFTTrainer,
    MoeTrainer,
    MoeTrainingArguments,
)
from hf_moe.views import unwrap_model


VOCAB = 128
FAMILIES = {
    "moe_llama": (MoeLlamaConfig, MoeLlamaForCausalLM),
    "moe_plus_plus": (MoePlusPlusConfig, MoePlusPlusForCausalLM),
}
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    "router_aux_loss_coef": 0.1,
}
EXPERT_LORA = {
    "r": 2,
    "lora_alpha": 4,
    "target_modules": [],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "task_type": "CAUSAL_LM",
}


def tiny_moe(family: str = "moe_llama", seed: int = 0, **config) -> PreTrainedModel:
    config_class, model_class = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(config_class(**{**SIZES, **config}))


def tiny_upcycled() -> PreTrainedModel:
    """A type without a backbone of ours, its feed-forwards replaced by the generic target."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=2, pad_token_id=0))
    model, _ = upcycle(dense, num_experts=4, top_k=2, target="generic")
    return model


def expert_lora(**options) -> LoraConfig:
    return LoraConfig(**{**EXPERT_LORA, **options})


def tiny_words() -> PreTrainedTokenizerFast:
    """A tokenizer whose words are `w3` ... `w127`, so that a test knows the ids of its text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )


def _text(length: int, generator: torch.Generator) -> str:
    return " ".join(f"w{i}" for i in torch.randint(3, VOCAB, (length,), generator=generator).tolist())


def token_rows(num_rows: int, seed: int = 0, pad: bool = True, length: int = 10) -> list[dict]:
    """Rows for the stock `Trainer`; with `pad`, of unequal lengths and with labels on a part of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(num_rows):
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        mask = torch.ones(length, dtype=torch.int64)
        labels = ids.clone()
        if pad:
            mask[int(torch.randint(length // 2, length + 1, (1,), generator=generator)) :] = 0
            labels[: int(torch.randint(0, length // 2 - 1, (1,), generator=generator))] = -100
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)})
    return rows


def completions(num_rows: int, seed: int = 0) -> Dataset:
    """Prompts and completions of unequal lengths, for SFT."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 7, (num_rows, 2), generator=generator).tolist()
    return Dataset.from_list(
        [{"prompt": _text(a, generator), "completion": " " + _text(b, generator)} for a, b in lengths]
    )


def preferences(num_rows: int, seed: int = 0) -> Dataset:
    """Prompts with a chosen and a rejected answer, for DPO."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 6, (num_rows, 3), generator=generator).tolist()
    return Dataset.from_list(
        [
            {"prompt": _text(a, generator), "chosen": " " + _text(b, generator), "rejected": " " + _text(c, generator)}
            for a, b, c in lengths
        ]
    )


def arguments(cls: type, folder, **options):
    """Arguments of a quiet run of one step on the CPU, in fp32."""
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_grad_norm": 0.0,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
    }
    return cls(**{**defaults, **options})


class Watch:
    """Mixed into a Trainer class: notes the micro-batches, losses and gradients of every optimizer step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches: list[list[dict]] = []
        self.losses: list[list[float]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.announced: list[int] = []
        self.add_callback(_NoteGradients(self))

    def get_batch_samples(self, *args, **kwargs):
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        self.batches.append([dict(batch) for batch in batches])
        self.losses.append([])
        return batches, num_items_in_batch

    def compute_loss(self, *args, **kwargs):
        result = super().compute_loss(*args, **kwargs)
        if self.model.training:
            self.losses[-1].append((result[0] if isinstance(result, tuple) else result).item())
        return result


class _NoteGradients(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        model = unwrap_model(model)
        named = model.named_parameters()
        self.trainer.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        for balancer, _ in find_balancers(model).values():
            self.trainer.announced.append(balancer.num_micro_batches.item())


TRAINERS = {
    "trainer": (MoeTrainer, MoeTrainingArguments, Trainer, TrainingArguments, token_rows),
    "sft": (MoeSFTTrainer, MoeSFTConfig, SFTTrainer, SFTConfig, completions),
    "dpo": (MoeDPOTrainer, MoeDPOConfig, DPOTrainer, DPOConfig, preferences),
}


def build(kind: str, folder, model=None, data=4, stock=False, lora=None, watch=True, trainer=None, **options):
    """A trainer of one of the three kinds.

    Args:
        data (`int` or dataset): Rows, or how many of them to make.
        stock (`bool`): The class of transformers or TRL instead of ours.
        lora (`LoraConfig`, *optional*): For TRL's trainers handed on, for the others applied here.
        trainer (`dict`, *optional*): Keyword arguments of the trainer; `options` are those of its arguments.
    """
    ours, config, stock_class, stock_config, dataset = TRAINERS[kind]
    cls, config = (stock_class, stock_config) if stock else (ours, config)
    model = tiny_moe() if model is None else model
    kwargs = {"train_dataset": dataset(data) if isinstance(data, int) else data, **(trainer or {})}
    if kind == "trainer":
        model = model if lora is None else get_peft_model(model, lora)
    else:
        kwargs |= {"processing_class": tiny_words(), "peft_config": lora}
    if kind == "dpo" and lora is None and isinstance(model, PreTrainedModel):
        kwargs.setdefault("ref_model", copy.deepcopy(model))
    cls = type(f"Watched{cls.__name__}", (Watch, cls), {}) if watch else cls
    return cls(model, args=arguments(config, folder, **options), **kwargs)


#: What PEFT and TRL of the tested versions call, and transformers 5.23 deprecates.
third_party_warnings = pytest.mark.filterwarnings(
    "ignore:`(is_gradient_checkpointing|gradient_checkpointing_(en|dis)able)` is deprecated:FutureWarning"
)
