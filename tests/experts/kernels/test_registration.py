"""The names are known after a plain `import hf_moe`, which stays cheap and leaves the import system as it was."""

import sys
import types

import pytest

from hf_moe import registration
from hf_moe.experts.kernels import IMPLEMENTATIONS


PROGRAM = """
import sys, torch
import hf_moe
assert "transformers.integrations.moe" not in sys.modules, "the import became dear"
from transformers import AutoModelForCausalLM, MixtralConfig

torch.manual_seed(0)
config = MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                       num_key_value_heads=2, num_local_experts=4)
model = AutoModelForCausalLM.from_config(config)
model.save_pretrained("mixtral")
model = AutoModelForCausalLM.from_pretrained("mixtral", experts_implementation="hf_moe")
assert model.config._experts_implementation == "hf_moe"
tokens = torch.arange(12)[None]
ours = model(tokens).logits
model.set_experts_implementation("eager")
torch.testing.assert_close(ours, model(tokens).logits)
model.set_experts_implementation("hf_moe_bucketed")

import transformers.integrations.moe as moe
assert type(moe.__loader__).__name__ == type(moe.__spec__.loader).__name__ == "SourceFileLoader"
assert not any(getattr(finder, "name", None) == moe.__name__ for finder in sys.meta_path)  # PEFT's may still wait
print("fine")
"""


def test_any_model_of_transformers_takes_our_name_after_a_plain_import(run_python):
    result = run_python(PROGRAM)
    assert result.stdout.split() == ["fine"], result.stderr


def test_the_order_of_the_imports_does_not_matter(run_python):
    code = """
import transformers.integrations.moe as moe
import hf_moe
print("hf_moe" in moe.ALL_EXPERTS_FUNCTIONS.valid_keys())
"""
    result = run_python(code)
    assert result.stdout.split() == ["True"], result.stderr


@pytest.mark.parametrize("first", ["front", "bank"])
def test_our_own_files_may_be_imported_first(run_python, first):
    code = f"""
import hf_moe.experts.kernels.{first}
from hf_moe.experts.kernels import choose_path
import transformers.integrations.moe as moe
print("hf_moe" in moe.ALL_EXPERTS_FUNCTIONS.valid_keys())
"""
    result = run_python(code)
    assert result.stdout.split() == ["True"], result.stderr


def test_every_implementation_is_in_the_registry():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    assert {name: ALL_EXPERTS_FUNCTIONS[name] for name in IMPLEMENTATIONS} == IMPLEMENTATIONS


def test_our_own_models_run_it():
    import torch

    from hf_moe import MoeLlamaConfig, MoeLlamaForCausalLM

    config = MoeLlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts=4, expert_capacity_factor=0.5,
    )  # fmt: skip
    model = MoeLlamaForCausalLM(config).eval()
    tokens = torch.arange(12)[None]
    expected = model(tokens).logits
    model.set_experts_implementation("hf_moe")
    torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.fixture
def module_file(tmp_path, monkeypatch):
    (tmp_path / "imported_later.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "imported_later"
    sys.modules.pop("imported_later", None)


def test_the_action_runs_once_after_the_module_was_imported(module_file):
    seen = []
    finders = list(sys.meta_path)
    registration.when_imported(module_file, lambda module: seen.append(module.VALUE))
    assert seen == []
    import imported_later

    assert seen == [1]
    assert sys.meta_path == finders
    assert type(imported_later.__loader__).__name__ == "SourceFileLoader"
    registration.when_imported(module_file, lambda module: seen.append(module.VALUE + 1))
    assert seen == [1, 2]


def test_a_module_that_does_not_exist_still_raises(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    registration.when_imported("no_such_module_at_all", lambda module: None)
    with pytest.raises(ModuleNotFoundError):
        __import__("no_such_module_at_all")


def test_a_module_whose_body_fails_runs_no_action_and_may_be_tried_again(tmp_path, monkeypatch):
    file = tmp_path / "fails_first.py"
    file.write_text("raise RuntimeError('first')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    seen = []
    registration.when_imported("fails_first", lambda module: seen.append(module))
    with pytest.raises(RuntimeError, match="first"):
        __import__("fails_first")
    assert seen == []
    file.write_text("VALUE = 'second time'\n")
    try:
        __import__("fails_first")
        assert isinstance(seen[0], types.ModuleType) and len(seen) == 1
    finally:
        sys.modules.pop("fails_first", None)
