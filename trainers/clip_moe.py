"""CLIP-MoE from a dense CLIP, all stages in one run that can be interrupted (2409.19291)."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from transformers import CLIPModel
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from hf_moe.files import new_folder, write_text
from hf_moe.upcycling import stretch_text_positions, upcycle_clip
from hf_moe.views import unwrap_model

from .clip_moe_config import ClipMoeConfig
from .contrastive_losses import retrieval_recall
from .contrastive_stages import cluster_stage, encode_pairs, train_stage
from .contrastive_trainer import ContrastiveTrainer


__all__ = ["train_clip_moe"]

logger = logging.get_logger(__name__)

SETTINGS = "clip_moe.json"
#: What a run that goes on must have in common with the one that was interrupted.
KEPT = (
    "experts", "num_experts", "num_experts_per_tok", "num_clusters", "vision_layers", "text_layers",
    "stretch_positions", "seed", "image_column", "text_column",
)  # fmt: skip


def train_clip_moe(
    base: CLIPModel,
    args: ClipMoeConfig,
    train_dataset: Any,
    *,
    eval_dataset: Any = None,
    data_collator: Any = None,
    processing_class: Any = None,
) -> ContrastiveTrainer:
    """[CLIP-MoE](https://huggingface.co/papers/2409.19291) from start to end: multistage contrastive learning
    ([`multistage_contrastive_learning`]), the stages put together ([`~hf_moe.upcycle_clip`]), tuning of the routers.

    Every finished stage is kept in `output_dir` (`stage-1/model`, ...; the tuning's checkpoints in `tuning`). With
    `args.resume_from_checkpoint` (any true value) an interrupted run goes on where it was.

    Args:
        base (`CLIPModel`): The dense model; left as it is.
        args ([`ClipMoeConfig`]): Of all stages.
        train_dataset: Rows, as for [`ContrastiveTrainer`]; all stages use the same.
        eval_dataset (*optional*): Evaluated while tuning, as `args` say, and in the end: `eval_results.json` has how
            pairs find each other ([`retrieval_recall`]) in the dense model and in the mixture.
        data_collator (`Callable`, *optional*): Rows to a batch, such as a [`ClipCollator`].
        processing_class (`CLIPProcessor`, *optional*): Saved with checkpoints of the tuning.

    Returns:
        [`ContrastiveTrainer`]: That of the tuning, after it; its `model` is the [`~hf_moe.MoeClipModel`].

    Raises:
        ValueError: a folder with an earlier run, other settings than those of the run to go on with, clusters that do
            not fill a batch, or `deepspeed` or `fsdp`.
        TypeError: `base` is no `CLIPModel`, or `args` of another class.

    Example:

    ```python
    >>> trainer = train_clip_moe(clip, ClipMoeConfig("out"), pairs, data_collator=ClipCollator(processor))
    >>> trainer.save_model("out")
    ```
    """
    if not isinstance(base, CLIPModel) or type(base).__name__ == "MoeClipModel":
        raise TypeError(f"`base` must be a dense CLIPModel, got {type(base).__name__}.")
    if not isinstance(args, ClipMoeConfig):
        raise TypeError(f"`args` must be a ClipMoeConfig, got {type(args).__name__}.")
    if args.deepspeed or args.fsdp:
        raise ValueError(
            "`deepspeed` and `fsdp` must be left out: stages are copies of one whole model, data parallel."
        )
    _check_run(args, len(train_dataset))
    if args.stretch_positions:
        base = stretch_text_positions(base)
    models = [base]
    if args.experts == "mcl":
        before = None
        for stage in range(1, args.num_experts):
            logger.info(f"CLIP-MoE, stage {stage} of {args.num_experts - 1}.")
            model, before = _stage(stage, models, before, args, train_dataset, data_collator)
            models.append(model)
    chosen = models if args.experts == "mcl" else None
    moe = upcycle_clip(
        base,
        chosen,
        num_experts=args.num_experts,
        num_experts_per_tok=args.num_experts_per_tok,
        vision_layers=_layers(args.vision_layers),
        text_layers=_layers(args.text_layers),
        seed=args.seed,
        expert_dropout=args.expert_dropout,
    )
    del models, chosen
    options = _tuning(args)
    logger.info(f"CLIP-MoE, tuning of {'routers' if options.trained == 'router' else 'routers and experts'}.")
    trainer = ContrastiveTrainer(
        moe,
        options,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=data_collator,
        processing_class=processing_class,
    )
    trainer.train(resume_from_checkpoint=_last_checkpoint(Path(options.output_dir)))
    moe.requires_grad_(True)
    if eval_dataset is not None:
        _evaluate({"dense": base, "moe": unwrap_model(trainer.model)}, trainer, eval_dataset, args)
    return trainer


def _stage(stage: int, models: list, before: Any, args: ClipMoeConfig, data: Any, collator: Any) -> tuple[Any, Any]:
    """A stage's model and labels: those in its folder, or new ones that are put there."""
    base, folder = models[0], Path(args.output_dir) / f"stage-{stage}"
    is_main = args.process_index == 0
    labels_file, kept = folder / "clusters.safetensors", folder / "model"
    if labels_file.exists():
        labels = load_file(labels_file)["labels"]
    else:
        labels = cluster_stage(models[-1], data, args, stage, before, args.num_clusters, collator)
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({"labels": labels}, labels_file.with_suffix(".partial"))
            labels_file.with_suffix(".partial").replace(labels_file)
    if kept.exists():
        return CLIPModel.from_pretrained(kept, dtype=base.dtype).to(base.device).eval(), labels
    options = copy.copy(args)
    options.output_dir, options.push_to_hub = str(folder), False
    # What stages learn shows in the mixture; data to evaluate with are not within clusters.
    options.eval_strategy, options.load_best_model_at_end, options.do_eval = "no", False, False
    options.router_learning_rate = options.expert_learning_rate = None  # there are none yet
    model, trainer = train_stage(base, data, options, stage, labels, collator, resume=_last_checkpoint(folder))
    if is_main:
        with new_folder(kept) as partial:
            model.save_pretrained(partial)
    trainer.accelerator.wait_for_everyone()
    return model, labels


def _tuning(args: ClipMoeConfig) -> ClipMoeConfig:
    options = copy.copy(args)
    options.output_dir, options.push_to_hub = str(Path(args.output_dir) / "tuning"), False
    if args.experts == "copies":
        options.trained = "moe"
    else:
        options.trained, options.weight_decay = "router", args.router_weight_decay
        options.expert_learning_rate = None
    if args.tuning_steps is not None:
        options.max_steps = args.tuning_steps
    return options


def _check_run(args: ClipMoeConfig, rows: int) -> None:
    """Refuses to mix two runs; notes the settings of this one."""
    folder = Path(args.output_dir)
    settings = {name: getattr(args, name) for name in KEPT} | {"rows": rows}
    path = folder / SETTINGS
    if path.exists():
        if not args.resume_from_checkpoint:
            raise ValueError(
                f"`{folder}` holds an earlier run. Pass `resume_from_checkpoint=True` to go on with it, or choose "
                "another `output_dir`."
            )
        known = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name in settings if known.get(name) != settings[name]]
        if other:
            raise ValueError(
                f"`{folder}` holds a run with other settings: "
                + ", ".join(f"{name} {known.get(name)!r} instead of {settings[name]!r}" for name in other)
                + ". Go on with those, or choose another `output_dir`."
            )
    PartialState().wait_for_everyone()  # nobody takes what is written now for an earlier run
    if args.process_index == 0:
        write_text(path, json.dumps(settings, indent=2) + "\n")


@torch.no_grad()
def _evaluate(models: dict[str, Any], trainer: ContrastiveTrainer, data: Any, args: ClipMoeConfig) -> None:
    found = {}
    for name, model in models.items():
        device = model.device
        features = encode_pairs(model.to(args.device), data, trainer.data_collator, args.eval_batch_size)
        model.to(device)
        found |= {f"eval_{name}_{key}": value for key, value in retrieval_recall(*features).items()}
    trainer.log(found)
    if trainer.is_world_process_zero():
        write_text(Path(args.output_dir) / "eval_results.json", json.dumps(found, indent=2) + "\n")


def _layers(words: str) -> str | list[int]:
    parts = [part.strip() for part in words.split(",")]
    return [int(part) for part in parts] if all(part.isdecimal() for part in parts) else words


def _last_checkpoint(folder: Path) -> str | None:
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None
