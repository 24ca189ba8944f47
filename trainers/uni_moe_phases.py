"""`train_uni_moe`: the three phases of Uni-MoE in a row, or one of them (2405.11273)."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoProcessor, PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from hf_moe.upcycling.combine_uni_moe import combine_uni_moe
from hf_moe.upcycling.sources import load_source

from .moe_trainer import MoeTrainer
from .uni_moe_collator import UniMoeCollator
from .uni_moe_config import UniMoeTrainingArguments, parse_mix
from .uni_moe_plan import UniMoeRun, check_model, plan_runs
from .uni_moe_stages import set_uni_moe_stage, uni_moe_lora_config


__all__ = ["train_uni_moe"]

logger = logging.get_logger(__name__)

# Written by the Trainer after everything else.
DONE = "trainer_state.json"


def train_uni_moe(
    model: PreTrainedModel | str,
    args: UniMoeTrainingArguments,
    train_dataset: Any,
    processing_class: Any = None,
    eval_dataset: Any = None,
    callbacks: Sequence[Any] = (),
) -> Any:
    """The progressive training of [Uni-MoE](https://huggingface.co/papers/2405.11273).

    | phase | trains | on | one run per |
    |---|---|---|---|
    | 1 `alignment` | a connector | rows with that modality alone | connector |
    | 2 `experts` | a copy of what phase 1 gave: connectors and language model | the rows of its mix | expert |
    | 3 `joint` | routers and projectors, LoRA on the rest of the language model | all rows | |

    Phase 2 ends with one model that has an expert from each copy ([`combine_uni_moe`]): phase 3 starts with it. Each
    connector is that of the first copy tuned on its modality, all else that of the first copy.

    Everything is checked before the first step. In `args.output_dir`, `alignment/<connector>`,
    `experts/<number>-<mix>` and `joint` hold the checkpoints of their runs and the model each ended with, `combined`
    the model phase 3 starts from, and the folder itself the result with its processor.

    With `args.resume_from_checkpoint`, what is finished is loaded, and the run that was interrupted goes on.

    Args:
        model (`UniMoeForConditionalGeneration` or `str`): With one expert per layer for phase 2
            (`upcycle_uni_moe(dense, num_experts=1, top_k=1, ...)`), several for phase 3 alone.
        args ([`UniMoeTrainingArguments`]): Phases, and arguments of their runs.
        train_dataset (`datasets.Dataset` or `Sequence[dict]`): Rows as [`UniMoeCollator`] reads them, of all
            modalities: phases choose among them.
        processing_class ([`UniMoeProcessor`], *optional*): That of `model` by default.
        eval_dataset (*optional*): Rows to evaluate each run on, all of them.
        callbacks (`Sequence`, *optional*): Callbacks of every run.

    Returns:
        `UniMoeForConditionalGeneration`, or a `PeftModel` if phase 3 ends without merging.

    Raises:
        ValueError: see [`UniMoeTrainingArguments`]; a model that does not fit the phase; data without rows for one of
            the runs, or that the model cannot read; a folder with an earlier run; sharded training.

    Example:

    ```python
    >>> args = UniMoeTrainingArguments("out", expert_data=["image+text", "speech+image", "video"], max_steps=1000)
    >>> moe = train_uni_moe(model, args, rows, processor)
    ```
    """
    model = load_source(model)
    source = model.name_or_path
    processor = AutoProcessor.from_pretrained(source) if processing_class is None else processing_class
    check_model(model, processor, args)
    runs = plan_runs(model, processor, args, train_dataset)
    home = Path(str(args.output_dir))
    if not args.resumes:
        _refuse_earlier(home, runs)
    training = _Training(args, processor, eval_dataset, callbacks)
    experts: list[str] = []
    for run in runs:
        folder = home / run.folder
        if run.phase == "joint":
            if args.expert_models:
                model = _together(args.expert_models, [parse_mix(mix) for mix in args.expert_data or ()], args)
            model = _written(model, home / "combined", training)
            model = training.joint(model, run, folder)
        elif run.phase == "alignment":
            model = training.full(model, run, folder)
        else:
            tuned = training.full(model, run, folder, copied=True)
            experts.append(str(folder))
            del tuned
            if len(experts) == sum(each.phase == "experts" for each in runs):
                mixes = [parse_mix(each.mix) for each in runs if each.phase == "experts"]
                model = _together(experts, mixes, args)
    training.save(model, home)
    return model


class _Training:
    """What the runs have in common."""

    def __init__(self, args: UniMoeTrainingArguments, processor: Any, eval_dataset: Any, callbacks: Sequence[Any]):
        self.args, self.processor, self.eval_dataset, self.callbacks = args, processor, eval_dataset, callbacks

    def full(self, model: Any, run: UniMoeRun, folder: Path, copied: bool = False) -> Any:
        """A run that trains some weights of the model, or of a copy."""
        if self._is_done(folder):
            return load_source(os.fspath(folder))
        model = copy.deepcopy(model) if copied else model
        set_uni_moe_stage(model, run.stage, run.connector)
        return self._train(model, run, folder)

    def joint(self, model: Any, run: UniMoeRun, folder: Path) -> Any:
        """Phase 3: an adapter, in the end merged or not."""
        from peft import PeftModel, get_peft_model

        if self._is_done(folder):
            adapted: Any = PeftModel.from_pretrained(model, os.fspath(folder))
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.args.seed)
                lora = uni_moe_lora_config(model, self.args.adapter_rank, self.args.adapter_alpha)
                adapted = get_peft_model(model, lora)
            adapted = self._train(adapted, run, folder)
        return adapted.merge_and_unload() if self.args.merge_adapter else adapted

    def save(self, model: Any, folder: Path) -> None:
        """The model and its processor, by one process."""
        state = PartialState()
        if state.is_main_process:
            model.save_pretrained(folder)
            self.processor.save_pretrained(folder)
        state.wait_for_everyone()

    def _is_done(self, folder: Path) -> bool:
        return self.args.resumes and (folder / DONE).is_file()

    def _arguments(self, run: UniMoeRun, folder: Path) -> UniMoeTrainingArguments:
        args = copy.copy(self.args)
        # Runs are not pushed: the result is.
        args.output_dir, args.push_to_hub, args.resume_from_checkpoint = os.fspath(folder), False, None
        args.max_steps = args.max_steps if run.steps is None else run.steps
        args.learning_rate = args.learning_rate if run.learning_rate is None else run.learning_rate
        return args

    def _train(self, model: Any, run: UniMoeRun, folder: Path) -> Any:
        trainer = MoeTrainer(
            model,
            self._arguments(run, folder),
            train_dataset=run.rows,
            eval_dataset=self.eval_dataset,
            data_collator=UniMoeCollator(self.processor),
            processing_class=self.processor,
            callbacks=list(self.callbacks),
        )
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "`train_uni_moe` copies and joins whole models between its runs, which FSDP and DeepSpeed shard. Use "
                "DDP (`accelerate launch --multi_gpu`), or `set_uni_moe_stage` with a trainer of your own."
            )
        logger.info(f"Uni-MoE, {run.folder}: {len(run.rows)} rows.")
        last = get_last_checkpoint(os.fspath(folder)) if self.args.resumes and folder.is_dir() else None
        trainer.train(resume_from_checkpoint=last)
        trainer.save_model(os.fspath(folder))
        trainer.save_state()
        trainer.accelerator.wait_for_everyone()
        return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def _together(models: Sequence[str], mixes: Sequence[frozenset[str]], args: UniMoeTrainingArguments) -> Any:
    """Models as experts of one; a connector comes from the first model that was tuned on its modality."""
    wanted = {"image": {"image", "video"}, "speech": {"speech"}, "audio": {"audio"}}
    first = {name: next((i for i, mix in enumerate(mixes) if mix & kinds), None) for name, kinds in wanted.items()}
    trunk: Any = load_source(models[0]).base_model
    chosen = {name: index for name, index in first.items() if index is not None and name in trunk.connectors()}
    return combine_uni_moe(list(models), min(args.num_experts_per_tok, len(models)), args.seed, connectors=chosen)


def _written(model: Any, folder: Path, training: _Training) -> Any:
    """The model phase 3 starts from, written down: it is what an adapter belongs to."""
    if not training._is_done(folder.parent / "joint"):
        training.save(model, folder)
    return load_source(os.fspath(folder))


def _refuse_earlier(home: Path, runs: Sequence[UniMoeRun]) -> None:
    for run in runs:
        folder = home / run.folder
        if folder.is_dir() and ((folder / DONE).is_file() or get_last_checkpoint(os.fspath(folder))):
            raise ValueError(
                f"`{home}` holds an earlier run ({run.folder}). Pass `resume_from_checkpoint=True` to go on with it, "
                "or choose another `output_dir`."
            )
