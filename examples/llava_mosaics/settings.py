"""How large everything is, and how long it is trained."""

from dataclasses import dataclass


__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """One budget, the same for all arms.

    Args:
        seeds (`tuple[int, ...]`): Of students: their data and routers. Tower and teacher are made once.
        language_model (`str`): A folder or Hub id, `"auto"` (SmolLM2-135M-Instruct), or `"random"`, a tiny one.
        student_layers (`tuple[int, ...]`): Layers of the teacher's language model that students keep.
        tower_hidden, tower_layers, tower_steps, tower_batch (`int`): The small CLIP.
        turns, batch_size (`int`): Questions in a conversation with the teacher, conversations in a step.
        student_turns, student_batch (`int`): Those of students. In long conversations later answers can be told from
            earlier ones, in short ones more must be seen.
        align_steps (`int`): Steps of the teacher's projector on captions.
        teacher_steps (`int`): Steps of the teacher on conversations.
        dense_steps, sparse_steps (`int`): Steps of a student before and after it is made sparse.
        preference_steps (`int`): Steps on preferences, or on conversations in the arm without.
        held_out (`int`): Mosaics in each group of held-out questions.
        align_rate, teacher_rate, student_rate, preference_rate (`float`): Learning rates; of the projector, of the
            teacher, of students in all arms, on preferences.
    """

    name: str
    seeds: tuple[int, ...]
    language_model: str
    student_layers: tuple[int, ...]
    tower_hidden: int
    tower_layers: int
    tower_steps: int
    tower_batch: int
    turns: int
    batch_size: int
    student_turns: int
    student_batch: int
    align_steps: int
    teacher_steps: int
    dense_steps: int
    sparse_steps: int
    preference_steps: int
    held_out: int
    align_rate: float = 1e-3
    teacher_rate: float = 3e-4
    student_rate: float = 5e-4
    preference_rate: float = 1e-4


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "tiny",
            seeds=(0,),
            language_model="random",
            student_layers=(0, 3),
            tower_hidden=32,
            tower_layers=2,
            tower_steps=3,
            tower_batch=8,
            turns=4,
            batch_size=2,
            student_turns=4,
            student_batch=2,
            align_steps=1,
            teacher_steps=2,
            dense_steps=2,
            sparse_steps=2,
            preference_steps=2,
            held_out=24,
        ),
        Preset(
            "short",
            seeds=(0, 1, 2),
            language_model="auto",
            student_layers=(0, 6, 12, 17, 23, 29),
            tower_hidden=128,
            tower_layers=4,
            tower_steps=500,
            tower_batch=64,
            turns=8,
            batch_size=4,
            student_turns=4,
            student_batch=4,
            align_steps=40,
            teacher_steps=280,
            dense_steps=180,
            sparse_steps=180,
            preference_steps=50,
            held_out=400,
        ),
        Preset(
            "full",
            seeds=(0, 1, 2, 3, 4),
            language_model="auto",
            student_layers=(0, 3, 6, 9, 12, 15, 18, 22, 26, 29),
            tower_hidden=192,
            tower_layers=6,
            tower_steps=6000,
            tower_batch=256,
            turns=8,
            batch_size=32,
            student_turns=4,
            student_batch=32,
            align_steps=300,
            teacher_steps=3000,
            dense_steps=3000,
            sparse_steps=3000,
            preference_steps=800,
            held_out=2000,
            teacher_rate=2e-4,
            student_rate=3e-4,
            preference_rate=3e-5,
        ),
    )
}
