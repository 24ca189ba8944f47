"""Uni-MoE under TRL's trainers, on images, and in transformers' pipeline."""

import copy

import pytest
import torch
from common.tiny_llava import images
from common.tiny_training import arguments, third_party_warnings
from common.tiny_uni_moe import TOKENS, make_processor, uni_moe
from datasets import Dataset
from transformers import pipeline
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_moe.trainers import MoeSFTConfig, MoeSFTTrainer


pytestmark = third_party_warnings

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<{{ part['type'] }}>{% endif %}{% endfor %}{% endif %}"
    "{{ '</s>' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def parts(tiny_tokenizer):
    """A model that sees images, and its processor."""
    tiny_tokenizer.add_tokens([f"<{name}>" for name in TOKENS], special_tokens=True)
    token = tiny_tokenizer.convert_tokens_to_ids("<image>")
    fields = {"image_token_id": token, "router_aux_loss_coef": 0.01, "text": {"vocab_size": len(tiny_tokenizer)}}
    model = uni_moe(("image",), **fields)
    return model, make_processor(tiny_tokenizer, model.config, parts=("image",), chat_template=TEMPLATE)


def say(role, text, image=False):
    return {"role": role, "content": [{"type": "image"}] * image + [{"type": "text", "text": text}]}


def rows(preferences: bool):
    made = []
    for number, image in enumerate(images(4)):
        row = {"images": [image], "prompt": [say("user", f"what is in picture {number}?", image=True)]}
        answers = [[say("assistant", text)] for text in ("the river runs past the mill", "three cats")]
        names = ("chosen", "rejected") if preferences else ("completion",)
        made.append(row | dict(zip(names, answers, strict=False)))
    return Dataset.from_list(made)


@pytest.mark.parametrize(
    ("trainer_class", "config_class"),
    [(SFTTrainer, SFTConfig), (MoeSFTTrainer, MoeSFTConfig), (DPOTrainer, DPOConfig)],
)
def test_trl_trains_it_on_images(trainer_class, config_class, parts, tmp_path):
    model, processor = parts
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    args = arguments(config_class, tmp_path, max_steps=3, learning_rate=1e-2, max_length=None)
    data = rows(config_class is DPOConfig)
    reference = {"ref_model": copy.deepcopy(model)} if config_class is DPOConfig else {}
    trainer = trainer_class(model=model, args=args, train_dataset=data, processing_class=processor, **reference)
    trainer.train()
    moved = {name.split(".")[1] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {"language_model", "image_connector"} <= moved and "vision_encoder" not in moved
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_pipeline_answers_about_images(parts, tmp_path):
    model, processor = parts
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    answer = pipeline("image-text-to-text", model=str(tmp_path), device="cpu")
    content = [{"type": "image", "image": images(1)[0]}, {"type": "text", "text": "what runs here?"}]
    options = {"max_new_tokens": 4, "generate_kwargs": {"do_sample": False}}
    said = answer(text=[{"role": "user", "content": content}], **options)[0]["generated_text"]
    assert said[-1]["role"] == "assistant" and isinstance(said[-1]["content"], str)
