"""The generic target: dense classes with MoE blocks, for types without a backbone of their own."""

import pickle
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from hf_moe import upcycle
from hf_moe.models.upcycled import upcycled_config_class, upcycled_model_class
from hf_moe.upcycling import Copy


SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SOURCES = {
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 8, "num_key_value_heads": 2}),
    "phi": (PhiConfig, PhiForCausalLM, {}),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {}),
}


def dense(kind):
    config_class, model_class, extra = SOURCES[kind]
    torch.manual_seed(0)
    return model_class(config_class(**SIZES, **extra)).eval()


@pytest.fixture
def ids():
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", SOURCES)
def test_copies_compute_the_dense_model_before_and_after_reloading(kind, ids, tmp_path):
    model = dense(kind)
    moe, report = upcycle(model, num_experts=4, top_k=2, target="generic")
    assert report.target == "generic"
    assert report.predicted_exact
    assert report.measured.max_difference <= 1e-6
    moe.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(moe)
    assert torch.equal(again(ids).logits, moe(ids).logits)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_experts_implementation_gives_the_dense_logits(implementation, ids):
    model = dense("gemma2")
    moe, _ = upcycle(model, num_experts=4, top_k=2, check=False)
    moe.set_experts_implementation(implementation)
    assert moe.config._experts_implementation == implementation
    torch.testing.assert_close(moe(ids).logits, model(ids).logits, rtol=0, atol=1e-6)


def test_generation_is_that_of_the_dense_model(ids):
    model = dense("phi")
    moe, _ = upcycle(model, num_experts=4, top_k=2, target="generic", check=False)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(moe.generate(ids, **options), model.generate(ids, **options))


def test_chosen_layers_only_are_replaced():
    moe, _ = upcycle(dense("gemma2"), num_experts=2, top_k=1, layers=[1], check=False)
    assert moe.config.moe_modules == ["layers.1.mlp"]
    assert [name for name, _ in moe.moe_blocks()] == ["model.layers.1.mlp"]


def test_the_balance_loss_is_added_in_training_and_its_router_learns(ids):
    moe, _ = upcycle(dense("phi"), target="generic", num_experts=4, top_k=2, check=False)
    moe.train()
    output = moe(ids, labels=ids)
    plain = moe.eval()(ids, labels=ids)
    assert plain.get("aux_loss") is None
    torch.testing.assert_close(output.loss, plain.loss + 0.01 * output.aux_loss, rtol=0, atol=1e-6)
    output.loss.backward()
    assert all(block.gate.weight.grad.abs().sum() > 0 for _, block in moe.moe_blocks())


def test_padding_does_not_enter_the_balance_loss(ids):
    moe, _ = upcycle(dense("phi"), target="generic", num_experts=4, top_k=2, check=False)
    padded = torch.cat([ids, torch.zeros_like(ids)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], dim=1)
    short = moe(ids, output_router_logits=True).aux_loss
    torch.testing.assert_close(moe(padded, attention_mask=mask, output_router_logits=True).aux_loss, short)


def test_tuples_are_returned_on_request(ids):
    moe, _ = upcycle(dense("phi"), target="generic", num_experts=2, top_k=1, check=False)
    output = moe(ids, output_router_logits=True, return_dict=False)
    assert isinstance(output, tuple)
    assert torch.equal(output[0], moe(ids).logits)


def test_models_pickle(ids):
    moe, _ = upcycle(dense("phi"), target="generic", num_experts=2, top_k=1, check=False)
    again = pickle.loads(pickle.dumps(moe))
    assert torch.equal(again(ids).logits, moe(ids).logits)


def test_a_fresh_process_loads_it_after_importing_hf_moe(ids, tmp_path):
    moe, _ = upcycle(dense("gemma2"), num_experts=2, top_k=1, check=False)
    moe.save_pretrained(tmp_path)
    script = (
        "import hf_moe, sys, torch; from transformers import AutoConfig, AutoModelForCausalLM\n"
        "print(type(AutoConfig.from_pretrained(sys.argv[1])).__name__)\n"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["UpcycledGemma2Config", "UpcycledGemma2ForCausalLM"]


def test_a_vision_tower_is_upcycled_too():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tower = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=16, patch_size=8)).eval()
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"pass `calibration`.*or `check=False`"):
        upcycle(tower, num_experts=4, top_k=2)
    moe, report = upcycle(tower, num_experts=4, top_k=2, check=False)
    assert report.target == "generic"
    expected = tower(pixels).last_hidden_state
    torch.testing.assert_close(moe(pixels).last_hidden_state, expected, rtol=0, atol=1e-6)


def test_stateful_routers_are_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"router_type='gating_residual'.*hands state from layer to layer"):
        upcycled_config_class("phi")(**SIZES, moe_modules=["layers.0.mlp"], router_type="gating_residual")


def test_unknown_dense_types_are_refused():
    with pytest.raises(ValueError, match="`dense_type='no_such_type'` is not a model type"):
        upcycled_config_class("no_such_type")


def test_models_without_plain_feed_forwards_are_refused_by_name():
    model = MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64))
    with pytest.raises(ValueError, match="MambaForCausalLM cannot be upcycled"):
        upcycle(model, num_experts=2, top_k=1, experts=Copy())


def test_classes_are_made_once():
    assert upcycled_config_class("phi") is upcycled_config_class("phi")
    assert upcycled_model_class(PhiForCausalLM) is upcycled_model_class(PhiForCausalLM)
    assert upcycled_config_class("phi").model_type == "upcycled_phi"
