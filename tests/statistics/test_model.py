"""The model type: registered, saved in float64, trained by the Trainer."""

import json

import pytest
import torch
from common.gaussian_mixtures import TEMPERED, draw
from datasets import Dataset
from transformers import AutoConfig, AutoModel, Trainer, TrainingArguments

from hf_moe import SoftmaxGaussianMoEConfig, SoftmaxGaussianMoEForRegression


@pytest.fixture
def model():
    return TEMPERED.to_model(gate="activation", learn_temperature=True)


def test_a_reloaded_model_is_the_same_in_float64(model, tmp_path):
    model.save_pretrained(tmp_path)
    x, y = draw(TEMPERED, 20, gate="dense_to_sparse")
    for reloaded in (
        AutoModel.from_pretrained(tmp_path),
        SoftmaxGaussianMoEForRegression.from_pretrained(tmp_path, dtype="auto"),
    ):
        assert type(reloaded) is SoftmaxGaussianMoEForRegression and reloaded.dtype == torch.float64
        assert torch.equal(reloaded.log_density(x, y), model.log_density(x, y))
    assert (tmp_path / "hf_moe_shim.py").exists()
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float64"
    single = SoftmaxGaussianMoEForRegression.from_pretrained(tmp_path, dtype=torch.float32)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single(x).mean, model(x).mean.float(), rtol=1e-5, atol=1e-5)


def test_the_type_is_known_to_a_process_that_only_imports_the_package(model, tmp_path, run_python):
    model.save_pretrained(tmp_path)
    code = f"""
import hf_moe
from transformers import AutoModel
model = AutoModel.from_pretrained({str(tmp_path)!r})
print(type(model).__name__, model.dtype, float(model.temperature.detach()))
"""
    assert run_python(code).stdout.split() == ["SoftmaxGaussianMoEForRegression", "torch.float64", "0.8"]


def test_a_config_is_the_same_after_saving(tmp_path):
    config = SoftmaxGaussianMoEConfig(num_components=3, input_size=4, gate="top_k", top_k=2)
    config.save_pretrained(tmp_path)
    reloaded = AutoConfig.from_pretrained(tmp_path)
    reloaded._name_or_path = config._name_or_path
    assert type(reloaded) is SoftmaxGaussianMoEConfig and reloaded.to_dict() == config.to_dict()


def test_what_is_set_while_loading_is_checked_too(tmp_path):
    SoftmaxGaussianMoEForRegression(SoftmaxGaussianMoEConfig(gate="top_k", top_k=1)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`top_k` must be between 1"):
        SoftmaxGaussianMoEForRegression.from_pretrained(tmp_path, top_k=5)


def test_the_trainer_reduces_the_loss_and_accumulates_right(tmp_path):
    x, y = draw(TEMPERED, 256, -2, 2, gate="dense_to_sparse")
    data = Dataset.from_dict({"x": x.tolist(), "labels": y.tolist()})

    def train(batch, accumulation, steps):
        torch.manual_seed(0)
        model = SoftmaxGaussianMoEForRegression(SoftmaxGaussianMoEConfig(gate="activation"))
        args = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=steps,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
        )
        trainer = Trainer(model, args, train_dataset=data, eval_dataset=data)
        trainer.train()
        return trainer

    trainer = train(64, 1, 40)
    before = SoftmaxGaussianMoEForRegression(SoftmaxGaussianMoEConfig(gate="activation"))(x, labels=y).loss
    assert trainer.evaluate()["eval_loss"] < before - 0.3
    whole, parts = (train(*sizes, 3).model for sizes in ((64, 1), (16, 4)))
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_compiled_model_gives_the_same_numbers(model):
    x, y = draw(TEMPERED, 20, gate="dense_to_sparse")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, labels=y).loss, model(x, labels=y).loss)
