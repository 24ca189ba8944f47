"""LoRA on attention and on stacked experts: trains, saves, loads and merges."""

import pytest
import torch
from common.model_battery import GPT2_LIKE, TYPES, make_inputs, make_model, seeded
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_moe.routing import BaseRouter


# PEFT asks for it by its older name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
every_type = pytest.mark.parametrize("model_type", TYPES)


def attention(model_type):
    return ["c_attn"] if model_type in GPT2_LIKE else ["q_proj", "v_proj"]


def experts(model_type):
    return ["mlp.experts.up_proj" if model_type in GPT2_LIKE else "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def targets(model_type, what) -> dict:
    if what == "attention":
        return {"target_modules": attention(model_type), "fan_in_fan_out": model_type in GPT2_LIKE}
    if what == "router":  # not a linear layer: trained whole
        return {"target_modules": attention(model_type)[:1], "modules_to_save": ["gate"]} | (
            {"fan_in_fan_out": True} if model_type in GPT2_LIKE else {}
        )
    return {"target_modules": [], "target_parameters": experts(model_type)}


def adapted(model_type, what, **changes):
    """A model with adapters that do something from the start."""
    base = make_model(model_type, tie_word_embeddings=False, **changes)
    with seeded():
        model = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", **targets(model_type, what)))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def train(model, inputs, steps=10):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@every_type
@pytest.mark.parametrize("what", ["attention", "experts", "router"])
def test_adapters_train_save_load_and_merge(model_type, what, tmp_path):
    inputs = make_inputs(padding="left")
    plain = make_model(model_type, tie_word_embeddings=False)(**inputs).logits
    model = adapted(model_type, what)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = train(model, inputs)
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]) and parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
    trained = model(**inputs).logits
    assert not torch.allclose(trained, plain, atol=1e-2)
    with model.disable_adapter():
        torch.testing.assert_close(model(**inputs).logits, plain, rtol=1e-4, atol=1e-5)

    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored and all("lora" in name or "gate." in name for name in stored)
    loaded = PeftModel.from_pretrained(make_model(model_type, tie_word_embeddings=False), tmp_path).eval()
    torch.testing.assert_close(loaded(**inputs).logits, trained, rtol=1e-4, atol=1e-5)
    merged = loaded.merge_and_unload()
    assert type(merged) is type(make_model(model_type))
    torch.testing.assert_close(merged(**inputs).logits, trained, rtol=1e-3, atol=1e-4)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(**inputs).logits, trained, rtol=1e-3, atol=1e-4)


@every_type
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_expert_adapters_agree_under_every_implementation(model_type, implementation):
    inputs = make_inputs(padding="left")
    results = []
    for name in ("eager", implementation):
        model = adapted(model_type, "experts", expert_capacity_factor=None)
        model.base_model.model.set_experts_implementation(name)
        outputs = model.train()(**inputs, labels=inputs["input_ids"])
        outputs.loss.backward()
        results.append((outputs, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (expected, wanted), (outputs, gradients) = results
    torch.testing.assert_close(outputs.loss, expected.loss)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5)


@every_type
def test_the_balance_loss_stays_exact_with_adapters(model_type):
    model = adapted(model_type, "router", router_aux_loss_coef=0.5)
    inputs = make_inputs()
    outputs = model.train()(**inputs, labels=inputs["input_ids"])
    routers = [module for module in model.modules() if isinstance(module, BaseRouter)]
    assert len(outputs.router_logits) == 2 and outputs.aux_loss.item() > 0
    outputs.aux_loss.backward()
    used = [router for router in routers if any(p.grad is not None for p in router.parameters())]
    assert len(used) == 2  # the copies PEFT trains, not the frozen originals


@every_type
def test_checkpointing_works_with_expert_adapters(model_type):
    inputs = make_inputs()
    gradients = []
    for checkpointing in (False, True):
        model = adapted(model_type, "experts").train()
        if checkpointing:
            model.base_model.model.activation_checkpointing_enable()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradient, gradients[0][name], rtol=1e-4, atol=1e-6)
