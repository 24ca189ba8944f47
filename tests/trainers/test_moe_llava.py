"""MoE-LLaVA under TRL's trainers, and the three stages of its training."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from common.tiny_llava import IMAGE_TOKEN, dense_llava, images, make_processor, moe_llava
from common.tiny_training import Watch, arguments, expert_lora, third_party_warnings
from datasets import Dataset
from transformers import AutoModelForImageTextToText
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_moe import MoeLlavaForConditionalGeneration, upcycle_llava
from hf_moe.trainers import (
    MoeDPOConfig,
    MoeDPOTrainer,
    MoeSFTConfig,
    MoeSFTTrainer,
    MoeTuningConfig,
    MoeTuningStageCallback,
    moe_tuning_trainer,
    set_moe_tuning_stage,
)
from hf_moe.trainers.command import METHODS
from hf_moe.trainers.moe_tuning_trainer import IgnoreImageTokens
from hf_moe.trainers.scripts import moe_llava as script
from hf_moe.views import unwrap_model


pytestmark = third_party_warnings

FFN = "model.language_model.layers.{}.mlp."
TRAINERS = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig),
            "moe_sft": (MoeSFTTrainer, MoeSFTConfig), "moe_dpo": (MoeDPOTrainer, MoeDPOConfig)}  # fmt: skip


@pytest.fixture
def processor(tiny_tokenizer):
    return make_processor(tiny_tokenizer)


def fitted(make, processor, *args, **options):
    """A model whose vocabulary and image token are the processor's."""
    size = {"vocab_size": len(processor.tokenizer)}
    if make is dense_llava:
        return dense_llava(*args, **size, **options)
    model = moe_llava(*args, text=size, **options)
    model.config.image_token_index = processor.image_token_id
    return model


def say(role, text, image=False):
    content = [{"type": "image"}] * image + [{"type": "text", "text": text}]
    return {"role": role, "content": content}


def rows(kind, count=4):
    """Rows with one image each: `prompt` and `completion`, or `prompt`, `chosen`, `rejected`, or `messages`."""
    made = []
    for number, image in enumerate(images(count)):
        prompt = say("user", f"what is in picture {number}?", image=True)
        answers = [[say("assistant", text)] for text in ("the river runs past the mill", "three cats")]
        row = {"images": [image]}
        if kind == "messages":
            row["messages"] = [prompt, *answers[0]]
        elif "dpo" in kind:
            row |= {"prompt": [prompt], "chosen": answers[0], "rejected": answers[1]}
        else:
            row |= {"prompt": [prompt], "completion": answers[0]}
        made.append(row)
    return Dataset.from_list(made)


def trainer_of(kind, folder, model, processor, peft_config=None, callbacks=None, **options):
    base, config_class = TRAINERS[kind]
    watched = type(f"Watched{base.__name__}", (Watch, base), {})
    args = arguments(config_class, folder, max_length=None, **options)
    # TRL would load the reference from where the model came from, which is nowhere.
    reference = [copy.deepcopy(model)] if kind == "dpo" and peft_config is None else []
    return watched(
        model, *reference, args=args, train_dataset=rows(kind), processing_class=processor, peft_config=peft_config,
        callbacks=callbacks,
    )  # fmt: skip


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", TRAINERS)
def test_trl_trains_on_images(kind, lora, processor, tmp_path):
    model = fitted(moe_llava, processor, expert_capacity_factor=1.5)
    trainer = trainer_of(
        kind, tmp_path, model, processor, expert_lora() if lora else None, max_steps=5, learning_rate=0.02
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[-1]["loss"] < logs[0]["loss"] and all("aux_loss" in log for log in logs)
    assert "pixel_values" in trainer.batches[0][0]


def test_the_trainer_adds_the_models_own_balance_loss_once(processor, tmp_path):
    model = fitted(moe_llava, processor, router_aux_loss_coef=0.5)
    trainer = trainer_of("moe_sft", tmp_path, model, processor, learning_rate=0.0)
    trainer.train()
    (batch,) = trainer.batches[0]
    model = unwrap_model(trainer.model)
    model.train()
    output = model(**batch)
    assert trainer.losses[0][0] == pytest.approx(output.loss.item(), abs=1e-5)
    assert trainer.state.log_history[0]["aux_loss"] == pytest.approx(output.aux_loss.item(), abs=1e-5)


def test_trl_loads_it_by_path(processor, tmp_path):
    fitted(moe_llava, processor).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    trainer = trainer_of("sft", tmp_path / "out", str(tmp_path / "model"), None)
    trainer.train()
    assert type(trainer.model) is MoeLlavaForConditionalGeneration


# -- stages ------------------------------------------------------------------------------------------------------
def names_of(model, *beginnings):
    return {name for name, _ in model.named_parameters() if name.startswith(beginnings)}


@pytest.mark.parametrize("text_type", ["llama", "phi", "stablelm"])
def test_each_stage_trains_exactly_what_the_paper_trains(text_type):
    model = moe_llava(text_type, residual_expert=True)
    projector = names_of(model, "model.multi_modal_projector.")
    language = names_of(model, "model.language_model.", "lm_head.")
    feed_forwards = names_of(model, *(FFN.format(i) for i in range(3)))
    assert FFN.format(0) + "gate.weight" in feed_forwards and FFN.format(2) + "residual_gate.bias" in feed_forwards
    assert any(name.startswith(FFN.format(1)) for name in feed_forwards)  # dense layers too
    for stages, expected in (((3, "3", "moe"), feed_forwards), ((1, "projector"), projector),
                             (("2", "sft"), projector | language)):  # fmt: skip
        for stage in stages:
            assert set(set_moe_tuning_stage(model, stage)) == expected
            assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    assert set(set_moe_tuning_stage(dense_llava(text_type), 1)) == projector


@pytest.mark.parametrize(("kind", "stage"), [("sft", 1), ("moe_sft", 2), ("moe_sft", 3), ("moe_dpo", 3)])
def test_a_step_of_a_stage_changes_nothing_else(kind, stage, processor, tmp_path):
    model = fitted(moe_llava, processor)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = trainer_of(
        kind, tmp_path, model, processor, callbacks=[MoeTuningStageCallback(stage)], activation_checkpointing=True,
        max_steps=2,
    )  # fmt: skip
    trainer.train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    allowed = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert changed and changed <= allowed
    if stage == 3:
        assert {name for name in allowed if ".gate." in name} <= changed
        assert not any("vision_tower" in name or "projector" in name or "lm_head" in name for name in changed)


def test_a_dense_model_becomes_sparse_in_stage_three_and_starts_where_it_was(processor, tmp_path):
    dense = fitted(dense_llava, processor)
    args = arguments(
        MoeTuningConfig,
        tmp_path,
        stage="3",
        num_experts=3,
        moe_layers="0,1",
        expert_capacity_factor=0.0,
        max_length=None,
    )
    trainer = moe_tuning_trainer(dense, args, processing_class=processor, train_dataset=rows("sft"))
    assert isinstance(trainer, MoeSFTTrainer) and isinstance(trainer.model, MoeLlavaForConditionalGeneration)
    config = trainer.model.config
    assert (config.num_experts, config.moe_layer_indices, config.expert_capacity_factor) == (3, [0, 1], None)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        ours, theirs = (model.eval()(**batch).logits for model in (trainer.model, dense))
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=1e-5)
    trainer.train()


def test_dense_stages_need_no_router(processor, tmp_path):
    args = arguments(MoeTuningConfig, tmp_path, stage="projector", max_length=None)
    trainer = moe_tuning_trainer(
        fitted(dense_llava, processor), args, processing_class=processor, train_dataset=rows("sft")
    )
    assert isinstance(trainer, SFTTrainer) and not isinstance(trainer, MoeSFTTrainer)
    trainer.train()
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained == names_of(trainer.model, "model.multi_modal_projector.")


def test_image_tokens_are_no_labels(processor, tmp_path):
    args = arguments(MoeTuningConfig, tmp_path, max_length=None)
    model = fitted(moe_llava, processor)
    trainer = moe_tuning_trainer(model, args, processing_class=processor, train_dataset=rows("messages"))
    batch = next(iter(trainer.get_train_dataloader()))
    image = batch["input_ids"] == processor.image_token_id
    assert image.sum() == 8 and (batch["labels"][image] == -100).all()
    assert (batch["labels"][~image & batch["attention_mask"].bool()] >= 0).all()
    text_only = {"input_ids": torch.tensor([[3, IMAGE_TOKEN]])}
    assert IgnoreImageTokens(lambda _: text_only, IMAGE_TOKEN)([]) is text_only


def test_lora_says_itself_what_trains(processor, tmp_path):
    args = arguments(MoeTuningConfig, tmp_path, max_length=None)
    trainer = moe_tuning_trainer(
        fitted(dense_llava, processor), args, processing_class=processor, train_dataset=rows("sft"),
        peft_config=expert_lora(),
    )  # fmt: skip
    trainer.train()
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name and "mlp.experts" in name for name in trained)


def test_the_schedule_is_the_papers(tmp_path):
    rates = [arguments(MoeTuningConfig, tmp_path, stage=stage, learning_rate=None).learning_rate for stage in "123"]
    assert rates == [1e-3, 2e-5, 2e-5]
    args = arguments(MoeTuningConfig, tmp_path, stage="moe")
    assert (args.learning_rate, args.lr_scheduler_type, args.warmup_steps) == (0.01, "cosine", 0.03)


@pytest.fixture
def words(processor, tmp_path):
    """Function `stage -> arguments` of the script; the dense model of stage 0 and the data are there."""
    fitted(dense_llava, processor).save_pretrained(tmp_path / "0")
    processor.save_pretrained(tmp_path / "0")
    rows("messages").to_parquet(tmp_path / "data" / "train.parquet")

    def of(stage):
        paths = ["--model_name_or_path", str(tmp_path / str(stage - 1)), "--output_dir", str(tmp_path / str(stage)),
                 "--dataset_name", str(tmp_path / "data")]  # fmt: skip
        quiet = ["--use_cpu", "--bf16", "False", "--report_to", "none", "--disable_tqdm", "True", "--max_steps", "1",
                 "--per_device_train_batch_size", "2", "--activation_checkpointing", "False"]  # fmt: skip
        return ["--stage", str(stage), *paths, *quiet]

    return of


def test_the_script_goes_through_the_stages(words, tmp_path):
    for stage in (1, 2, 3):
        script.main(*script.make_parser().parse_args_and_config(words(stage), fail_with_unknown_args=False))
    kinds = [json.loads((tmp_path / stage / "config.json").read_text())["model_type"] for stage in "123"]
    assert kinds == ["llava", "llava", "moe_llava"]
    moe = AutoModelForImageTextToText.from_pretrained(tmp_path / "3")
    assert moe.config.num_experts == 4 and (tmp_path / "3" / "processor_config.json").is_file()
    assert "moe-llava" in METHODS


@pytest.mark.slow
def test_two_processes_train_the_last_stage(words, tmp_path):
    (tmp_path / "0").rename(tmp_path / "2")
    command = [sys.executable, "-m", "hf_moe.cli", "train", "moe-llava", *words(3)]
    run = subprocess.run(
        [*command, "--multi_gpu", "--num_processes", "2"], capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path / "3")) is MoeLlavaForConditionalGeneration


def test_what_no_stage_can_do_is_refused():
    with pytest.raises(ValueError, match=r"`stage` must be 1, 2 or 3, or one of \['projector', 'sft', 'moe'\], got 4"):
        MoeTuningStageCallback(4)
    with pytest.raises(ValueError, match=r"`stage` must be 1, 2 or 3"):
        MoeTuningConfig("out", stage="projektor", use_cpu=True, bf16=False, activation_checkpointing=False)
    with pytest.raises(ValueError, match=r"language model of `model` \(LlavaForConditionalGeneration\) is dense"):
        set_moe_tuning_stage(dense_llava(), 3)
    with pytest.raises(ValueError, match=r"\(MoeLlamaModel\) is no LLaVA"):
        set_moe_tuning_stage(moe_llava().model.language_model, 3)
    from peft import get_peft_model

    moe, _ = upcycle_llava(dense_llava(), check=False)
    with pytest.raises(ValueError, match=r"`model` has PEFT adapters.*`target_parameters="):
        set_moe_tuning_stage(get_peft_model(moe, expert_lora()), 3)
