"""What every other test relies on: no network, an own cache, the same tiny tokenizer and model each time."""

import os
import warnings

import pytest
import torch


def test_the_hub_is_off_limits():
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE
    assert constants.HF_HOME == os.environ["HF_HOME"]
    assert "hf-moe-tests-" in constants.HF_HOME


def test_the_tiny_tokenizer_gives_text_back_exactly(tiny_tokenizer):
    text = "A miller kept three cats — über, 5 €."
    assert tiny_tokenizer.decode(tiny_tokenizer(text)["input_ids"]) == text
    assert len(tiny_tokenizer) == 384
    assert len(tiny_tokenizer("The river runs past the old mill")["input_ids"]) < 20  # merges were learned


def test_the_tiny_tokenizer_has_a_chat_template(tiny_tokenizer):
    text = tiny_tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|user|>hello</s><|assistant|>"


def test_the_tiny_model_has_the_same_weights_each_time(tiny_llama, tiny_llama_config):
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    again = LlamaForCausalLM(tiny_llama_config)
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, tiny_llama.state_dict()[name]), name


def test_warnings_are_errors():
    with pytest.raises(UserWarning):
        warnings.warn("an unlisted warning", stacklevel=1)


def test_a_fresh_interpreter_runs_elsewhere_with_the_installed_package(run_python):
    result = run_python("import os, hf_moe; print(os.environ['HF_HUB_OFFLINE'], os.listdir('.'))")
    assert result.stdout == "1 []\n", result.stderr
