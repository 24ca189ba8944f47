"""The examples in the docstrings run as they stand, but for the name of the model."""

import inspect

import pytest
from common.tiny_training import third_party_warnings, tiny_words

from hf_moe import trainers
from hf_moe.trainers import parameter_groups


pytestmark = third_party_warnings

REAL_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def example(documented) -> str:
    lines = (line.strip() for line in inspect.getdoc(documented).split("```python")[1].split("```")[0].splitlines())
    return "\n".join(line[4:] for line in lines if line.startswith((">>> ", "... ")))


@pytest.mark.parametrize(
    "name", ["MoeTrainer", "MoeSFTTrainer", "MoeDPOTrainer", "MoeTrainerMixin", "MoeTrainingArguments", "MoeSFTConfig"]
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_examples_run(name, tmp_path, tiny_llama, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama.save_pretrained("dense")
    tiny_words().save_pretrained("dense")
    code = example(getattr(trainers, name)).replace(REAL_MODEL, "dense")
    scope = {}
    exec(compile(code, name, "exec"), scope)
    if "trainer" in scope:
        assert scope["trainer"].state.global_step == 2
        assert (tmp_path / "out").is_dir()


def test_the_example_of_the_groups_runs(tiny_llama):
    import torch

    from hf_moe import upcycle

    model, _ = upcycle(tiny_llama, num_experts=4, top_k=2)
    scope = {"model": model, "torch": torch}
    exec(compile(example(parameter_groups.optimizer_groups), "optimizer_groups", "exec"), scope)
    assert scope["groups"][0]["lr"] == 1e-5
