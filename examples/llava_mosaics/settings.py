"""How large everything is, and how long it is trained."""

from dataclasses import dataclass


__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """One budget, the same for all arms.

    Args:
        seeds (`tuple[int, ...]`): Of students: their data and routers. Tower and teacher are made once.
        language_model (`str`): A folder or Hub id, `"auto"` (SmolLM2-135M-Instruct), or `"random"`, a tiny one.
        student_layers (`int`): Layers of the teacher's language model that students keep.
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
    student_layers: int
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
    student_rate: float = 1e-3
    preference_rate: float = 1e-4


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("tiny", (0,), "random", 2, 32, 2, 3, 8, 4, 2, 4, 2, 1, 2, 2, 2, 2, 24),
        Preset("short", (0, 1, 2), "auto", 6, 128, 4, 500, 64, 8, 4, 4, 8, 40, 280, 90, 90, 30, 400),
        Preset("full", (0, 1, 2, 3, 4), "auto", 10, 192, 6, 6000, 256, 8, 32, 4, 64, 300, 3000, 2000, 2000, 600, 2000),
    )
}
