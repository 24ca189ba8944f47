"""What every reproduction is made of: arms that are trained on the same real text with the same budget.

A file of this folder defines `REPRODUCTION`; `run.py` runs its arms with every seed, in processes of one thread each,
and writes one table for all. An arm is a function of a [`Bench`], which says how large models are, trains and
measures.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from text import VOCABULARY, Text, load_text


__all__ = ["PRESETS", "Arm", "Bench", "Preset", "Reproduction"]


@dataclass(frozen=True)
class Preset:
    """The budget of one run and the size of its model; the same for all arms.

    Args:
        name (`str`): `"tiny"` (seconds, for trying out), `"short"` (all reproductions in half an hour on two cores) or
            `"full"` (a GPU, or days).
        steps (`int`): Optimizer steps of a run.
        seeds (`tuple[int, ...]`): One run of each arm with each.
        batch_size, length (`int`): Sequences per step and tokens per sequence.
        hidden_size, layers, heads, intermediate_size (`int`): Of the Llama the arms are built on.
        learning_rate (`float`): Highest of a cosine with a warm-up of a tenth of the steps.
        initializer_range (`float`): Standard deviation of initial weights.
    """

    name: str
    steps: int
    seeds: tuple[int, ...]
    batch_size: int
    length: int
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    learning_rate: float
    initializer_range: float

    def scale(self, short: Any, full: Any, tiny: Any = None) -> Any:
        """The value for this preset; `tiny` is `short` where it is not given."""
        values = {"short": short, "full": full, "tiny": short if tiny is None else tiny}
        return values[self.name]


PRESETS = {
    "tiny": Preset("tiny", 4, (0, 1), 2, 32, 32, 2, 2, 48, 6e-3, 0.06),
    "short": Preset("short", 300, (0, 1, 2), 4, 128, 96, 4, 4, 192, 6e-3, 0.06),
    "full": Preset("full", 5000, (0, 1, 2, 3, 4), 32, 512, 384, 8, 6, 1024, 1e-3, 0.02),
}

#: An arm: runs one model and returns its figures.
Arm = Callable[["Bench"], dict[str, float]]


@dataclass(frozen=True)
class Reproduction:
    """One claim of a paper and the arms that try it.

    Args:
        name (`str`): Name of the file.
        papers (`tuple[str, ...]`): arXiv numbers.
        claim (`str`): What the paper says one should see, in a sentence.
        arms (`dict[str, Arm]`): By the name of the table's row.
        baseline (`str`): The arm the others are compared with, seed by seed.
        metric (`str`): The figure that is compared.
        lower_is_better (`bool`): Whether a smaller figure is a better one.
        target (`float`, *optional*): What theory says the figure should be; then no arm is called better or worse.
    """

    name: str
    papers: tuple[str, ...]
    claim: str
    arms: dict[str, Arm]
    baseline: str
    metric: str = "bits_per_byte"
    lower_is_better: bool = True
    target: float | None = None

    def __post_init__(self):
        if self.baseline not in self.arms:
            raise ValueError(f"`baseline` must be one of the arms {list(self.arms)}, got {self.baseline!r}.")


class Bench:
    """Where an arm runs: one preset, one seed.

    Args:
        preset ([`Preset`]): Sizes and budget.
        seed (`int`): Seed of initial weights, order of the text and everything drawn in training.
    """

    def __init__(self, preset: Preset, seed: int):
        self.preset = preset
        self.seed = seed

    @cached_property
    def text(self) -> Text:
        """The text in blocks of the preset's length."""
        return load_text(self.preset.length, 60_000 if self.preset.name == "tiny" else 1_000_000)

    @property
    def domains(self) -> dict[str, torch.Tensor]:
        """Training blocks of each domain, `(M, S)`."""
        return self.text.train

    @property
    def held_out(self) -> dict[str, torch.Tensor]:
        """Held-out blocks of each domain, `(M, S)`."""
        return self.text.held_out

    @cached_property
    def train_blocks(self) -> torch.Tensor:
        """Training blocks of all domains in equal parts, in the seed's order, `(M, S)`."""
        return self.text.mixed(self.seed)

    def sizes(self, **fields: Any) -> dict[str, Any]:
        """Fields of a Llama-like config of the preset's size, with `fields` over them."""
        preset = self.preset
        return {
            "vocab_size": VOCABULARY,
            "hidden_size": preset.hidden_size,
            "intermediate_size": preset.intermediate_size,
            "num_hidden_layers": preset.layers,
            "num_attention_heads": preset.heads,
            "num_key_value_heads": preset.heads,
            "max_position_embeddings": preset.length,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": None,
            "tie_word_embeddings": True,
            "initializer_range": preset.initializer_range,
            **fields,
        }

    def language_model(self, **fields: Any) -> Any:
        """A new `MoeLlamaForCausalLM` with the seed's weights; `fields` of its config. Experts are half as wide as the
        dense feed-forward unless `moe_intermediate_size` says otherwise."""
        from hf_moe import MoeLlamaConfig, MoeLlamaForCausalLM

        fields.setdefault("moe_intermediate_size", self.preset.intermediate_size // 2)
        return self.seeded(lambda: MoeLlamaForCausalLM(MoeLlamaConfig(**self.sizes(**fields))))

    def dense_model(self, **fields: Any) -> Any:
        """A new dense `LlamaForCausalLM` with the seed's weights."""
        from transformers import LlamaConfig, LlamaForCausalLM

        return self.seeded(lambda: LlamaForCausalLM(LlamaConfig(**self.sizes(**fields))))

    def seeded(self, build: Callable[[], Any]) -> Any:
        """What `build` makes with the seed's random numbers."""
        torch.manual_seed(self.seed)
        return build()

    def train(
        self,
        model: Any,
        *,
        steps: int | None = None,
        data: torch.Tensor | None = None,
        callbacks: Sequence[Any] = (),
        trainer_class: type | None = None,
        trainer_options: dict[str, Any] | None = None,
        arguments_class: type | None = None,
        **arguments: Any,
    ) -> Any:
        """Trains in place with `MoeTrainer` (a dense model with `Trainer`), or another class.

        Args:
            model: A causal language model.
            steps (`int`, *optional*): The preset's by default.
            data (`torch.Tensor` of shape `(M, S)`, *optional*): Blocks, taken in this order and from the start again
                when used up; [`train_blocks`] by default.
            callbacks (`Sequence`): Of the trainer.
            trainer_class, arguments_class (`type`, *optional*): Other classes.
            trainer_options (`dict`, *optional*): Further keyword arguments of the trainer.
            **arguments: Further fields of the training arguments, over the preset's.

        Returns:
            The trainer, after training.
        """
        from transformers import Trainer
        from transformers.trainer_callback import PrinterCallback

        from hf_moe.quickstart.data import TokenBlocks
        from hf_moe.trainers import MoeTrainer, MoeTrainingArguments

        steps = self.preset.steps if steps is None else steps
        with tempfile.TemporaryDirectory(prefix="hf-moe-") as scratch:
            fields = {
                "output_dir": scratch,
                "max_steps": steps,
                "per_device_train_batch_size": self.preset.batch_size,
                "learning_rate": self.preset.learning_rate,
                "lr_scheduler_type": "cosine",
                "warmup_steps": max(1, steps // 10),
                "weight_decay": 0.1,
                "train_sampling_strategy": "sequential",
                "logging_steps": max(1, steps // 10),
                "save_strategy": "no",
                "report_to": [],
                "disable_tqdm": True,
                "seed": self.seed,
                "dataloader_pin_memory": torch.cuda.is_available(),
                **arguments,
            }
            usual = MoeTrainer if hasattr(model.config, "num_experts") else Trainer
            trainer = (trainer_class or usual)(
                model,
                (arguments_class or MoeTrainingArguments)(**fields),
                train_dataset=TokenBlocks(self.train_blocks if data is None else data),
                callbacks=list(callbacks),
                **(trainer_options or {}),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return trainer

    @torch.no_grad()
    def evaluate(self, model: Any, domain: str | None = None) -> float:
        """Bits per byte of held-out text, a mean over all domains' text, or of one domain.

        Args:
            model: A causal language model; evaluated in evaluation mode.
            domain (`str`, *optional*): One of `held_out`.
        """
        blocks = self.held_out[domain] if domain else torch.cat(list(self.held_out.values()))
        training, nats, num_bytes = model.training, 0.0, 0.0
        model.eval()
        for batch in blocks.split(16):
            logits = model(input_ids=batch.to(model.device), use_cache=False).logits[:, :-1].float().cpu()
            nats += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
            ).item()
            num_bytes += self.text.bytes_per_token[batch[:, 1:]].sum().item()
        model.train(training)
        return nats / math.log(2) / num_bytes
