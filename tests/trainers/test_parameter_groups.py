import pytest
import torch
from common.tiny_families import tiny_model
from common.tiny_training import build, expert_lora, third_party_warnings, tiny_moe

from hf_moe.trainers import optimizer_groups, parameter_roles
from hf_moe.trainers.parameter_groups import split_param_groups


pytestmark = third_party_warnings


def names_by_role(model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    roles = {"rest": set(), "router": set(), "expert": set()}
    for parameter, role in parameter_roles(model).items():
        roles[role].add(names[parameter])
    return roles


def test_every_parameter_has_one_role():
    model = tiny_moe("moe_plus_plus", num_shared_experts=1)
    roles = names_by_role(model)
    assert sum(map(len, roles.values())) == len(list(model.parameters()))
    assert roles["router"] == {name for name, _ in model.named_parameters() if ".mlp.gate." in name}
    experts = {name for name, _ in model.named_parameters() if ".mlp.experts." in name or ".mlp.zero_experts." in name}
    assert roles["expert"] == experts
    assert any("shared_experts" in name for name in roles["rest"])


def test_in_tree_models_have_roles_too():
    roles = names_by_role(tiny_model("mixtral"))
    assert roles["router"] and all("gate" in name for name in roles["router"])
    assert roles["expert"] and all("experts" in name for name in roles["expert"])


def test_groups_hold_what_is_trained_with_its_rate():
    model = tiny_moe()
    model.lm_head.weight.requires_grad_(False)
    groups = optimizer_groups(model, 0.1, router_learning_rate=0.2, expert_learning_rate=0.0, weight_decay=0.5)
    rates = {group["role"]: group["lr"] for group in groups}
    assert rates == {"rest": 0.1, "router": 0.2, "expert": 0.0}
    assert groups[0]["role"] == "rest"
    parameters = [parameter for group in groups for parameter in group["params"]]
    assert len(parameters) == len(set(parameters)) == sum(p.requires_grad for p in model.parameters())
    for group in groups:
        assert all((parameter.dim() > 1) == (group["weight_decay"] == 0.5) for parameter in group["params"])


def test_rates_default_to_the_common_one():
    assert {group["lr"] for group in optimizer_groups(tiny_moe(), 0.1)} == {0.1}


@pytest.mark.parametrize(("lora", "kind"), [(False, "trainer"), (False, "dpo"), (True, "sft")])
def test_trainers_split_the_groups_and_schedule_each(lora, kind, tmp_path):
    rates = {"learning_rate": 0.01, "router_learning_rate": 0.1, "expert_learning_rate": 0.04}
    options = {"lr_scheduler_type": "linear", "max_steps": 4, "weight_decay": 0.5, **rates}
    adapter = expert_lora(target_modules=["q_proj"], modules_to_save=["gate"]) if lora else None
    trainer = build(kind, tmp_path, lora=adapter, data=8, **options)
    stock = build(kind, tmp_path, lora=adapter, data=8, stock=True, watch=False, learning_rate=0.01, weight_decay=0.5)
    stock.create_optimizer()
    trainer.train()
    groups = trainer.optimizer.param_groups
    assert {group["role"]: group["initial_lr"] for group in groups} == {"rest": 0.01, "router": 0.1, "expert": 0.04}
    logged = [log["learning_rate"] for log in trainer.state.log_history if "loss" in log]
    assert logged == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    # Weight decay is what the Trainer decided for each parameter.
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    decays = {names[p]: group["weight_decay"] for group in groups for p in group["params"]}
    names = {parameter: name for name, parameter in stock.model.named_parameters()}
    assert decays == {
        names[p]: group["weight_decay"] for group in stock.optimizer.param_groups for p in group["params"]
    }


def test_a_rate_of_zero_freezes(tmp_path):
    model = tiny_moe()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    build("trainer", tmp_path, model, router_learning_rate=0.0, max_steps=2).train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("gate." in name), name


def test_an_optimizer_given_by_the_user_is_left_alone(tmp_path):
    model = tiny_moe()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = build("trainer", tmp_path, model, trainer={"optimizers": (optimizer, None)}, router_learning_rate=0.1)
    trainer.train()
    assert len(optimizer.param_groups) == 1


def test_bad_rates_and_used_optimizers_are_refused(tmp_path):
    model = tiny_moe()
    with pytest.raises(ValueError, match=r"`router_learning_rate` must not be negative, got -1\.0"):
        optimizer_groups(model, 0.1, router_learning_rate=-1.0)
    with pytest.raises(ValueError, match=r"`learning_rate` must not be negative, got -0\.1"):
        optimizer_groups(model, -0.1)
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match=r"`expert_learning_rate` must not be negative"):
        split_param_groups(optimizer, model, expert_learning_rate=-1.0)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="`optimizer` has made steps"):
        split_param_groups(optimizer, model, expert_learning_rate=1.0)
