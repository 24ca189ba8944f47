"""What TRL's own options do to MoE-LLaVA: losses, the fused head, its auxiliary loss, LoRA."""

import pytest
import torch
from common.tiny_llava import dense_llava, images, make_processor, moe_llava
from common.tiny_training import Watch, arguments, expert_lora, third_party_warnings
from datasets import Dataset
from peft import PeftModel
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_moe.trainers import MoeTuningConfig, moe_tuning_trainer


pytestmark = third_party_warnings


@pytest.fixture
def processor(tiny_tokenizer):
    return make_processor(tiny_tokenizer)


def fitted(processor, **fields):
    model = moe_llava(text={"vocab_size": len(processor.tokenizer)}, **fields)
    model.config.image_token_index = processor.image_token_id
    return model


def say(role, text, image=False):
    return [{"role": role, "content": [{"type": "image"}] * image + [{"type": "text", "text": text}]}]


def rows(preferences: bool) -> Dataset:
    answers = [say("assistant", text) for text in ("the river runs past the mill", "three cats")]
    columns = dict(zip(("chosen", "rejected") if preferences else ("completion",), answers, strict=False))
    made = [{"images": [image], "prompt": say("user", f"what is in picture {i}?", True), **columns}
            for i, image in enumerate(images(4))]  # fmt: skip
    return Dataset.from_list(made)


def trained(trainer_class, config_class, model, processor, folder, lora=None, trainer_options=None, **options):
    """A stock trainer after its run, with its micro-batches and losses noted."""
    watched = type(f"Watched{trainer_class.__name__}", (Watch, trainer_class), {})
    args = arguments(config_class, folder, max_length=None, **options)
    reference = {"ref_model": fitted(processor, seed=1)} if config_class is DPOConfig and lora is None else {}
    trainer = watched(
        model=model, args=args, train_dataset=rows(config_class is DPOConfig), processing_class=processor,
        peft_config=lora, **reference, **(trainer_options or {}),
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("trainer", ["sft", "dpo"])
def test_the_auxiliary_loss_is_mixtrals_times_the_option(trainer, lora, processor, tmp_path):
    classes = (SFTTrainer, SFTConfig) if trainer == "sft" else (DPOTrainer, DPOConfig)
    found = {}
    for coefficient in (0.0, 0.5):
        run = trained(
            *classes, fitted(processor), processor, tmp_path, expert_lora() if lora else None, learning_rate=0.0,
            router_aux_loss_coef=coefficient, train_sampling_strategy="sequential",
        )  # fmt: skip
        found[coefficient] = run.state.log_history[0]
    # All layers pooled, every choice counted: K = 2 where experts are used alike.
    assert found[0.5]["aux_loss"] > 1.9 and "aux_loss" not in found[0.0]
    difference = found[0.5]["loss"] - found[0.0]["loss"]
    assert difference == pytest.approx(0.5 * found[0.5]["aux_loss"], abs=2e-5)


def test_the_fused_head_computes_the_models_own_loss(processor, tmp_path):
    model = fitted(processor, router_aux_loss_coef=0.0)
    run = trained(SFTTrainer, SFTConfig, model, processor, tmp_path, learning_rate=0.0)
    (batch,) = run.batches[0]
    with torch.no_grad():
        expected = model.train()(**batch).loss
    assert run.losses[0][0] == pytest.approx(expected.item(), abs=1e-5)


def own_loss(outputs, labels, num_items_in_batch=None):
    return outputs.logits.float().mean() ** 2


@pytest.mark.parametrize(("trainer", "options", "trainer_options"), [
    ("sft", {"loss_type": "dft"}, {}),
    ("sft", {"label_smoothing_factor": 0.1}, {}),
    ("sft", {}, {"compute_loss_func": own_loss}),
    ("sft", {"activation_checkpointing": True}, {}),
    ("dpo", {"loss_type": ["ipo"]}, {}),
    ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, {}),
    ("dpo", {"use_weighting": True, "ld_alpha": 0.5}, {}),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*will be removed in v2.0.0:FutureWarning")  # of TRL, about its own options
def test_other_losses_train_it_too(trainer, options, trainer_options, processor, tmp_path):
    classes = (SFTTrainer, SFTConfig) if trainer == "sft" else (DPOTrainer, DPOConfig)
    model = fitted(processor, router_aux_loss_coef=0.01)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = trained(*classes, model, processor, tmp_path, trainer_options=trainer_options, max_steps=2, **options)
    logs = [log for log in run.state.log_history if "loss" in log]
    assert len(logs) == 2 and all("aux_loss" in log for log in logs)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any(".mlp.gate." in name for name in moved) and any(".mlp.experts." in name for name in moved)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_head_that_liger_would_replace_is_refused(processor, tmp_path):
    options = {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}}
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match=r"fused_linear_cross_entropy.*not supported"):
        trained(SFTTrainer, SFTConfig, fitted(processor), processor, tmp_path, **options)


def test_an_adapter_is_saved_loaded_and_merged(processor, tmp_path):
    run = trained(SFTTrainer, SFTConfig, fitted(processor), processor, tmp_path, expert_lora(), max_steps=3)
    run.save_model(tmp_path / "adapter")
    batch = {name: value for name, value in run.batches[0][0].items() if name != "labels"}
    with torch.no_grad():
        expected = run.model.eval()(**batch).logits
        plain = fitted(processor)(**batch).logits
        again = PeftModel.from_pretrained(fitted(processor), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(**batch).logits, expected, rtol=0, atol=1e-5)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=0, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-3


@pytest.mark.parametrize("trainer", ["sft", "dpo"])
def test_a_prompt_cut_through_its_image_is_told(trainer, processor, tmp_path):
    classes = (SFTTrainer, SFTConfig) if trainer == "sft" else (DPOTrainer, DPOConfig)
    model = fitted(processor)
    watched = arguments(classes[1], tmp_path, max_length=8)
    made = classes[0](
        model=model, args=watched, train_dataset=rows(trainer == "dpo"), processing_class=processor,
        **({"ref_model": fitted(processor, seed=1)} if trainer == "dpo" else {}),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"image tokens .*If a trainer cut the prompt, set its `max_length=None`"):
        made.train()


# -- a processor with other tokens -------------------------------------------------------------------------------
@pytest.mark.parametrize("sparse", [False, True])
def test_other_tokens_are_refused_before_anything_is_trained(sparse, processor, tmp_path):
    args = arguments(MoeTuningConfig, tmp_path / "out", stage="3", max_length=None)
    options = {"processing_class": processor, "train_dataset": rows(False)}
    size = len(processor.tokenizer)
    make = fitted if sparse else lambda processor: dense_llava(vocab_size=size)
    model = make(processor)
    model.resize_token_embeddings(size - 1)
    with pytest.raises(
        ValueError, match=rf"its tokenizer knows {size} tokens, but the vocabulary of `model` has {size - 1}"
    ):
        moe_tuning_trainer(model, args, **options)
    model = make(processor)
    model.config.image_token_id = 5
    with pytest.raises(ValueError, match=rf"its image token is {processor.image_token_id}, that of `model` 5"):
        moe_tuning_trainer(model, args, **options)
    assert not (tmp_path / "out").exists() and type(model) is type(make(processor))
