"""Mixture-of-Students: a student with fewer layers that learns from a trained PR-MoE, to the end or for a part.

All students train equally long, with the same text in the same order. The teacher has seen that text and more.
"""

from dataclasses import dataclass
from typing import Any

from harness import Bench, Reproduction


__all__ = ["REPRODUCTION"]


def new_teacher(bench: Bench) -> Any:
    """A PR-MoE with random weights."""
    layers = bench.preset.layers
    return bench.language_model(
        num_experts=[4] * (layers - layers // 2) + [8] * (layers // 2),
        num_experts_per_tok=1,
        moe_intermediate_size=bench.preset.intermediate_size,
        residual_expert=True,
        router_config={"norm_topk_prob": False},
    )


def trained_teacher(bench: Bench) -> Any:
    """The PR-MoE after half of the preset's steps."""
    model = new_teacher(bench)
    bench.train(model, steps=max(2, bench.preset.steps // 2))
    return model


def student_of(bench: Bench, teacher: Any, stop: float | None) -> dict[str, float]:
    """A student that started with random weights, after a third of the preset's steps.

    Args:
        bench ([`Bench`]): Preset and seed.
        teacher: The teacher.
        stop (`float`, *optional*): Share of the steps after which there is no teacher; `None` for never.
    """
    from transformers import Trainer

    from hf_moe import MoeLlamaForCausalLM, drop_layers
    from hf_moe.trainers import MoeTrainingArguments, StagedDistillationArguments, StagedDistillationMixin

    class Pretraining(StagedDistillationMixin, Trainer):
        pass

    @dataclass
    class Arguments(StagedDistillationArguments, MoeTrainingArguments):
        pass

    config = drop_layers(teacher.config, every=min(4, bench.preset.layers))
    student = bench.seeded(lambda: MoeLlamaForCausalLM(config))
    steps = max(2, bench.preset.steps // 3)
    bench.train(
        student,
        steps=steps,
        trainer_class=Pretraining,
        trainer_options={"teacher_model": teacher},
        arguments_class=Arguments,
        kd_stop_step=None if stop is None else int(stop * steps),
    )
    return {"bits_per_byte": bench.evaluate(student), "layers": float(config.num_hidden_layers)}


def teacher_itself(bench: Bench) -> dict[str, float]:
    """What there is to learn from."""
    return {"bits_per_byte": bench.evaluate(trained_teacher(bench)), "layers": float(bench.preset.layers)}


def alone(bench: Bench) -> dict[str, float]:
    """Cross-entropy only; of the teacher, the student has nothing but the shape."""
    return student_of(bench, new_teacher(bench), stop=0.0)


def to_the_end(bench: Bench) -> dict[str, float]:
    """Distilled in every step."""
    return student_of(bench, trained_teacher(bench), stop=None)


def staged(bench: Bench) -> dict[str, float]:
    """Distilled for the first half."""
    return student_of(bench, trained_teacher(bench), stop=0.5)


REPRODUCTION = Reproduction(
    name="mixture_of_students",
    papers=("2201.05596",),
    claim="A student of fewer layers is better for a teacher, and better still if the teacher stops before the end.",
    arms={
        "student alone": alone,
        "distilled to the end": to_the_end,
        "distilled, then alone": staged,
        "teacher": teacher_itself,
    },
    baseline="student alone",
)
