"""The stages a teacher and its students go through, each with the trainer a user would take, each kept when done.

    teacher   projector -> sft
    student   sft   -> sft                      supervised
              sft   -> moe                      MoE-LLaVA
              mimic -> mimic moe                LLaVA-MoD, dense to dense and dense to sparse
                       mimic moe -> mimic moe   the same, for as long as with preferences
                       mimic moe -> preference  LLaVA-MoD whole

Students begin as some layers of the teacher, with its projector, whatever they learn from afterwards.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from data import conversations, preferences
from fashion_mnist import Pictures
from models import make_llava, shallow
from mosaics import draw_mosaics
from settings import Preset
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from hf_moe import upcycle_llava
from hf_moe.files import write_text
from hf_moe.trainers import (
    MimicDistillationConfig,
    MimicDistillationTrainer,
    MoeTuningConfig,
    MoeTuningStageCallback,
    PreferenceDistillationConfig,
    PreferenceDistillationTrainer,
    moe_tuning_trainer,
)


__all__ = ["ARMS", "STAGES", "KeepWords", "Stage", "Workshop", "is_done"]


class Stage(NamedTuple):
    """One training run.

    Args:
        method (`str`): `"tune"`, `"mimic"` or `"preference"`.
        trains (`str`): A stage of MoE-tuning, which says what is trained: `"projector"`, `"sft"` or `"moe"`.
        after (`str`): The stage it goes on from; `""` for some layers of the teacher.
        part (`int`): Which part of the seed's data: 1 and 2 are conversations, 3 preferences or conversations.
    """

    method: str
    trains: str
    after: str
    part: int


# Fields of the preset that everything depends on.
_SHARED = ("language_model", "tower", "turns", "batch", "align")
#: Stages of a student by name; those of one part see the same mosaics and have as many steps.
STAGES = {
    "supervised 1": Stage("tune", "sft", "", 1),
    "supervised 2": Stage("tune", "sft", "supervised 1", 2),
    "sparse": Stage("tune", "moe", "supervised 1", 2),
    "mimic dense": Stage("mimic", "sft", "", 1),
    "mimic sparse": Stage("mimic", "moe", "mimic dense", 2),
    "mimic longer": Stage("mimic", "moe", "mimic sparse", 3),
    "preference": Stage("preference", "moe", "mimic sparse", 3),
}
#: What is compared, and the stage each ends with.
ARMS = {
    "dense, supervised": "supervised 2",
    "MoE-tuning": "sparse",
    "mimic distillation": "mimic sparse",
    "mimic, longer": "mimic longer",
    "mimic + preference": "preference",
}


class KeepWords(TrainerCallback):
    """Freezes the word embeddings, which are the head too: half of a student's weights, and it knows its words."""

    def on_init_end(self, args, state, control, **kwargs):
        kwargs["model"].get_input_embeddings().requires_grad_(False)


def is_done(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a folder holds what was trained with these settings.

    Raises:
        ValueError: with others.
    """
    file = folder / "done.json"
    if not file.exists():
        return False
    kept = json.loads(file.read_text(encoding="utf-8"))["settings"]
    changed = [name for name, value in settings.items() if kept.get(name) != value]
    if changed:
        raise ValueError(
            f"{folder} was trained with other settings ({', '.join(changed)}): choose another `--output`."
        )
    return True


class Workshop:
    """Trains stages and keeps them in a folder.

    Args:
        preset ([`Preset`]): Sizes and steps.
        pictures ([`Pictures`]): Those of the training split are trained with.
        folder (`Path`): Has the tower in `tower`; gets `teacher` and `seed-<seed>/<stage>`.
    """

    def __init__(self, preset: Preset, pictures: Pictures, folder: Path):
        self.preset = preset
        self.images, self.labels = pictures.train_images, pictures.train_labels
        self.folder = folder

    # -- the teacher ---------------------------------------------------------------------------------------------
    def teacher(self) -> tuple[Any, Any]:
        """The dense LLaVA with all layers: its projector is trained on captions, then everything on conversations."""
        preset, seed = self.preset, 1000

        def train() -> tuple[Any, Any]:
            model, processor = make_llava(self.folder / "tower", preset.language_model, seed)
            size, turns = preset.batch_size, preset.turns
            for stage, kind, part, steps, rate in (
                ("projector", "captions", 0, preset.align_steps, preset.align_rate),
                ("sft", "conversations", 1, preset.teacher_steps, preset.teacher_rate),
            ):
                rows = self.rows(kind, steps * size, turns, 10 * seed + part)
                self.tune(model, processor, rows, stage, steps, size, rate, seed)
            return model, processor

        model, processor = self.kept(self.folder / "teacher", self.settings(*_SHARED, "teacher"), train)
        return model.eval().requires_grad_(False), processor

    # -- students ------------------------------------------------------------------------------------------------
    def student(self, name: str, seed: int) -> tuple[Any, Any]:
        """A student after one of [`STAGES`], and its processor; what comes before is trained where it is missing."""
        stage, preset = STAGES[name], self.preset

        def train() -> tuple[Any, Any]:
            if stage.after:
                model, processor = self.student(stage.after, seed)
            else:
                model, processor = self.teacher()
                model = shallow(model, preset.student_layers).requires_grad_(True)
            if stage.trains == "moe" and stage.part == 2:
                model, _ = upcycle_llava(model, num_experts=4, top_k=2, layers="sparse", check=False, seed=seed)
            steps = (preset.dense_steps, preset.sparse_steps, preset.preference_steps)[stage.part - 1]
            fit = {"tune": self.tune, "mimic": self.mimic, "preference": self.prefer}[stage.method]
            size, turns = preset.student_batch, preset.student_turns
            rate, kind = preset.student_rate, "conversations"
            if stage.method == "preference":
                rate, kind = preset.preference_rate, "preferences"
            rows = self.rows(kind, steps * size, turns, 10 * seed + stage.part)
            fit(model, processor, rows, stage.trains, steps, size, rate, seed)
            return model, processor

        settings = self.settings(*_SHARED, "teacher", "student", "dense", "sparse", "preference")
        folder = self.folder / f"seed-{seed}" / name.replace(" ", "-")
        if stage.after and not is_done(folder, settings):
            self.student(stage.after, seed)  # now, so that its time is not counted below
        return self.kept(folder, settings, train)

    def rows(self, kind: str, count: int, turns: int, seed: int) -> Any:
        """Captions, conversations or preferences about so many new mosaics; the same mosaics for the same seed."""
        mosaics = draw_mosaics(self.labels, count, seed)
        if kind == "preferences":
            return preferences(mosaics, self.images, seed)
        return conversations(mosaics, self.images, turns, seed, captions=kind == "captions")

    # -- trainers ------------------------------------------------------------------------------------------------
    def tune(self, model: Any, processor: Any, rows: Any, stage: str, *budget: Any) -> None:
        """Supervised: MoE-LLaVA's stages."""
        args = self.arguments(MoeTuningConfig, *budget, stage=stage, assistant_only_loss=True)
        trainer = moe_tuning_trainer(
            model, args, processing_class=processor, train_dataset=rows, callbacks=[KeepWords()]
        )
        trainer.train()

    def mimic(self, model: Any, processor: Any, rows: Any, stage: str, *budget: Any) -> None:
        """What the teacher predicts; a sparse student learns the answers too."""
        teacher, _ = self.teacher()
        MimicDistillationTrainer(
            model,
            self.arguments(MimicDistillationConfig, *budget, assistant_only_loss=True),
            teacher_model=teacher,
            processing_class=processor,
            train_dataset=rows,
            callbacks=[MoeTuningStageCallback(stage), KeepWords()],
        ).train()

    def prefer(self, model: Any, processor: Any, rows: Any, stage: str, *budget: Any) -> None:
        """Right answers over wrong ones, with the teacher as the reference."""
        teacher, _ = self.teacher()
        PreferenceDistillationTrainer(
            model,
            self.arguments(PreferenceDistillationConfig, *budget),
            teacher_model=teacher,
            processing_class=processor,
            train_dataset=rows,
            callbacks=[MoeTuningStageCallback(stage), KeepWords()],
        ).train()

    def arguments(self, cls: type, steps: int, batch_size: int, rate: float, seed: int, **options: Any) -> Any:
        """Arguments of any of the trainers."""
        return cls(
            str(self.folder / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
            max_length=None,
            seed=seed,
            save_strategy="no",
            logging_steps=max(1, steps // 5),
            report_to="none",
            disable_tqdm=True,
            **options,
        )

    def settings(self, *prefixes: str) -> dict[str, Any]:
        """What a kept part depends on: fields of the preset that begin with one of these."""
        fields = json.loads(json.dumps(asdict(self.preset)))  # lists, as they are when they are read
        return {name: value for name, value in fields.items() if name.startswith(prefixes)}

    def kept(self, folder: Path, settings: dict[str, Any], train: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        """What is in the folder, or else what `train` makes, which is put there."""
        if not is_done(folder, settings):
            start = time.perf_counter()
            model, processor = train()
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            seconds = time.perf_counter() - start
            write_text(folder / "done.json", json.dumps({"settings": settings, "seconds": seconds}, indent=2) + "\n")
            print(f"{folder.parent.name}/{folder.name}: trained in {seconds:.0f} s", flush=True)
        return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
