"""TRL's trainers take our configs as `peft_config`."""

import pytest
import torch
from common.adapter_cases import CASES, tiny_llama
from datasets import Dataset
from peft import PeftModel


# TRL 1.16's configs set an argument that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

CAUSAL = [case for case in CASES if case.model is tiny_llama]


@pytest.fixture
def tiny_words(tiny_tokenizer_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_tokenizer_dir)


@pytest.mark.parametrize("case", CAUSAL, ids=lambda case: case.name)
def test_sft_trainer_takes_the_config(case, tiny_words, tmp_path):
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_dict({"text": ["The river runs past the old mill.", "A miller kept three cats."] * 2})
    base = tiny_llama(vocab_size=len(tiny_words))
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    args = SFTConfig(
        tmp_path / "run", max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, bf16=False, max_length=16, logging_steps=1,
    )  # fmt: skip
    trainer = SFTTrainer(base, args, train_dataset=rows, processing_class=tiny_words, peft_config=case.config())
    with case.within(trainer.model):
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    trainer.save_model(tmp_path / "adapter")
    trained = trainer.accelerator.unwrap_model(trainer.model).eval()
    again = PeftModel.from_pretrained(tiny_llama(vocab_size=len(tiny_words)), tmp_path / "adapter").eval()
    torch.testing.assert_close(case.output(again), case.output(trained))
    plain = trained.unload().state_dict()
    assert all(torch.equal(plain[name], value) for name, value in weights.items())


def test_dpo_reference_is_the_base_without_the_adapter(tiny_words, tmp_path):
    from trl import DPOConfig, DPOTrainer

    case = next(case for case in CAUSAL if case.name == "mosa")
    rows = Dataset.from_dict({"prompt": ["The river"] * 4, "chosen": [" runs."] * 4, "rejected": [" stands."] * 4})
    args = DPOConfig(
        tmp_path, max_steps=1, per_device_train_batch_size=4, learning_rate=0.0, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, bf16=False, max_length=16, logging_steps=1,
    )  # fmt: skip
    base = tiny_llama(vocab_size=len(tiny_words))
    trainer = DPOTrainer(base, args=args, train_dataset=rows, processing_class=tiny_words, peft_config=case.config())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == [pytest.approx(0.6931, abs=1e-3)]  # ln 2: a fresh adapter is the reference
