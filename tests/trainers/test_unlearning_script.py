import importlib
import json

import pytest
from common.tiny_training import third_party_warnings, tiny_moe, tiny_words
from transformers import AutoModelForCausalLM

from hf_moe.trainers import command


pytestmark = third_party_warnings

SCRIPT = importlib.import_module("hf_moe.trainers.scripts.unlearning")


@pytest.fixture
def folder(tmp_path):
    """A folder with a model and two sets of text."""
    tiny_moe().save_pretrained(tmp_path / "model")
    tiny_words().save_pretrained(tmp_path / "model")
    for name, words in (("forget", "w3 w4 w5 w6"), ("retain", "w9 w8 w7")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": words}) + "\n" + json.dumps({"text": words}))
    return tmp_path


def run(folder, *more):
    words = ["--model_name_or_path", str(folder / "model"), "--output_dir", str(folder / "out"), "--max_steps", "2"]
    words += ["--forget_dataset", str(folder / "forget.jsonl"), "--retain_dataset", str(folder / "retain.jsonl")]
    words += ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--dataloader_pin_memory", "false"]
    SCRIPT.main(*SCRIPT.make_parser().parse_args_and_config([*words, *more], fail_with_unknown_args=False))


def test_the_script_saves_an_adapter_and_what_it_measured(folder):
    run(folder, "--forget_loss", "npo", "--save_strategy", "no")
    assert json.loads((folder / "out" / "adapter_config.json").read_text())["peft_type"] == "HFMOE_EXPERT_SLICE"
    assert json.loads((folder / "out" / "eval_results.json").read_text())["eval_retain_loss"] > 0


def test_the_script_saves_a_whole_model(folder):
    run(folder, "--merge", "--save_strategy", "no", "--target_experts", '{"0": [1]}')
    assert AutoModelForCausalLM.from_pretrained(folder / "out").config.model_type == "moe_llama"
    assert not (folder / "out" / "adapter_config.json").exists()


def test_a_split_that_is_not_there_is_named(folder):
    with pytest.raises(ValueError, match=r"`--dataset_split dev` is not in `--forget_dataset .*\['train'\]"):
        run(folder, "--dataset_split", "dev")
    assert not (folder / "out").exists()


def test_hf_moe_train_tells_its_arguments_from_those_of_accelerate(folder):
    words = ["--model_name_or_path", "m", "--forget_dataset", "f", "--output_dir", "o", "--num_processes", "2"]
    launch, script = command.split_arguments("unlearning", words)
    assert launch == ["--num_processes", "2"] and script == words[:-2]
