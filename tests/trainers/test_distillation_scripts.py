"""`hf-moe train mimic` and `preference` with images: in one process, and in two."""

import subprocess
import sys
from importlib import import_module

import pytest
import torch
from common.tiny_llava import dense_llava, images, make_processor, moe_llava
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from hf_moe.trainers.command import METHODS


def say(role, text, image=False):
    return {"role": role, "content": [{"type": "image"}] * image + [{"type": "text", "text": text}]}


def rows(method):
    made = []
    for number, image in enumerate(images(4)):
        prompt = [say("user", f"what is in picture {number}?", image=True)]
        answers = [[say("assistant", text)] for text in ("the river runs past the mill", "three cats")]
        row = {"images": [image], "prompt": prompt}
        made.append(row | ({"completion": answers[0]} if method == "mimic" else
                           {"chosen": answers[0], "rejected": answers[1]}))  # fmt: skip
    return Dataset.from_list(made)


@pytest.fixture
def words(tiny_tokenizer, tmp_path):
    """Function `(method, folder, batch size, options) -> arguments`; student, teacher and data are there."""
    processor = make_processor(tiny_tokenizer)
    size = len(processor.tokenizer)
    student = moe_llava(text={"vocab_size": size}, router_aux_loss_coef=0.0)
    teacher = dense_llava("qwen2", 1, hidden_size=48, vocab_size=size)
    for name, model in (("student", student), ("teacher", teacher)):
        model.config.image_token_index = processor.image_token_id
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)

    def of(method, folder, batch_size, *options):
        rows(method).to_parquet(tmp_path / method / "train.parquet")
        config = tmp_path / f"{method}.yaml"
        config.write_text("max_length: null\n")
        return ["--config", str(config), "--model_name_or_path", str(tmp_path / "student"), "--dtype", "float32",
                "--teacher_model_name_or_path", str(tmp_path / "teacher"), "--dataset_name", str(tmp_path / method),
                "--output_dir", str(tmp_path / folder), "--use_cpu", "--bf16", "False", "--report_to", "none",
                "--disable_tqdm", "True", "--max_steps", "2", "--per_device_train_batch_size", str(batch_size),
                "--activation_checkpointing", "False", "--optim", "sgd", "--learning_rate", "0.05",
                "--lr_scheduler_type", "constant", "--max_grad_norm", "0", "--train_sampling_strategy",
                "sequential", *options]  # fmt: skip

    return of


def run(method, words):
    script = import_module(f"hf_moe.trainers.scripts.{method}")
    script.main(*script.make_parser().parse_args_and_config(words, fail_with_unknown_args=False))


PREFERENCE = ("--loss_type", "kto_pair", "--precompute_ref_log_probs")


@pytest.mark.parametrize(("method", "options"), [("mimic", ("--kd_on", "response")), ("preference", PREFERENCE)])
def test_the_script_trains_and_saves_the_student(method, options, words, tmp_path):
    run(method, words(method, "out", 2, *options))
    trained = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert trained.config.model_type == "moe_llava" and (tmp_path / "out" / "processor_config.json").is_file()
    assert method in METHODS
    before = load_file(tmp_path / "student" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "options"), [
    ("mimic", ()), ("preference", ()), ("preference", ("--precompute_ref_log_probs",)),
])  # fmt: skip
def test_two_processes_equal_one_with_twice_the_batch(method, options, words, tmp_path):
    run(method, words(method, "one", 2, *options))
    command = [sys.executable, "-m", "hf_moe.cli", "train", method, *words(method, "two", 1, *options)]
    done = subprocess.run(
        [*command, "--multi_gpu", "--num_processes", "2"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    start = load_file(tmp_path / "student" / "model.safetensors")
    assert any((one[name] - start[name]).abs().max() > 1e-4 for name in one)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-6, msg=name)
