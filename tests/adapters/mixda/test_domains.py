"""Stages, and domain adapters that are put together, added, removed and switched."""

import json
import shutil

import pytest
import torch
from common.mixda_models import IDS, MASK, perturb, saved_domain, tiny
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import hf_moe
from hf_moe import MixdaConfig


HOSTS = [f"bert.encoder.layer.{i}.output.dense" for i in (0, 1)]


def outputs(model, **kwargs):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=MASK, **kwargs).logits


def expert_tensors(model, domain, adapter_name="default"):
    part = f".hfmoe_mixda_expert.{adapter_name}.{domain}."
    return {
        (name.partition(part)[0].removeprefix("base_model.model."), name.partition(part)[2]): value.clone()
        for name, value in model.state_dict().items()
        if part in name
    }


def trained(model):
    names = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {name.split("hfmoe_mixda_")[1].split(".")[0] if "hfmoe" in name else "head" for name in names}


@pytest.fixture
def domains(tmp_path):
    """Folders and models of two domains, trained (that is, drawn) apart."""
    return {name: saved_domain(tmp_path / name, seed=seed) for seed, name in enumerate(("bio", "law"))}


def test_one_domain_is_handed_over_with_its_gate(domains):
    folder, first = domains["bio"]
    expected = outputs(first)
    second = get_peft_model(tiny("bert"), MixdaConfig.from_domains({"bio": folder}))
    assert torch.equal(outputs(second), expected)
    assert trained(second) == {"gate"}
    other = get_peft_model(tiny("bert"), MixdaConfig.from_domains({"bio": folder}, gate_hidden=[5]))
    gate = other.get_submodule(f"base_model.model.{HOSTS[0]}").cell("gate", "default")
    assert not gate.out.bias[0] and gate.out.bias[1] == 4.0  # of another form, so it starts anew


def test_several_domains_have_their_files_tensors_and_a_new_gate(domains):
    config = MixdaConfig.from_domains({name: folder for name, (folder, _) in domains.items()}, task_reduction=4)
    assert (config.domains, config.stage, config.reduction) == (["bio", "law"], "task", 8)
    model = get_peft_model(tiny("bert"), config)
    for name, (folder, first) in domains.items():
        mine = expert_tensors(model, name)
        assert len(mine) == 2 * 4
        theirs = expert_tensors(first, "domain")
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
        saved = load_file(f"{folder}/adapter_model.safetensors")
        for (path, inside), value in mine.items():
            assert torch.equal(saved[f"base_model.model.{path}.hfmoe_mixda_expert.domain.{inside}"], value)
    for path in HOSTS:
        gate = model.get_submodule(f"base_model.model.{path}").cell("gate", "default")
        assert gate.out.bias.tolist() == [0.0, 0.0, 4.0]
    again = get_peft_model(tiny("bert"), config)  # the config can be used once more
    assert torch.equal(expert_tensors(again, "law")[HOSTS[0], "up.weight"], mine[HOSTS[0], "up.weight"])


def test_a_second_stage_adapter_is_complete_in_itself(domains, tmp_path):
    folders = {name: folder for name, (folder, _) in domains.items()}
    model = perturb(get_peft_model(tiny("bert"), MixdaConfig.from_domains(folders, task_reduction=4)), "gate")
    model.set_domains(["law"])
    model.save_pretrained(tmp_path / "second")
    for folder in folders.values():
        shutil.rmtree(folder)
    again = PeftModel.from_pretrained(tiny("bert"), tmp_path / "second", is_trainable=True)
    assert torch.equal(outputs(again), outputs(model))
    assert trained(again) == {"gate", "task"} and again.peft_config["default"].enabled_domains == ["law"]
    # a second-stage adapter gives its domains to another one by their names
    both = get_peft_model(tiny("bert"), MixdaConfig.from_domains({"law": tmp_path / "second"}))
    assert both.peft_config["default"].domains == ["law"]
    mine, theirs = expert_tensors(both, "law"), expert_tensors(model, "law")
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    with pytest.raises(ValueError, match="none of them is called 'tax'"):
        MixdaConfig.from_domains({"tax": tmp_path / "second"})


def test_files_that_do_not_fit_are_refused_before_the_model_is_touched(domains, tmp_path):
    bio, law = domains["bio"][0], domains["law"][0]
    with pytest.raises(ValueError, match=r"There is no `adapter_config.json`"):
        MixdaConfig.from_domains({"bio": tmp_path / "nothing"})
    with pytest.raises(ValueError, match="at least one domain"):
        MixdaConfig.from_domains({})
    with pytest.raises(ValueError, match="words of letters"):
        MixdaConfig.from_domains({"b.io": bio})
    with pytest.raises(ValueError, match="`reduction` follows from the domain adapters"):
        MixdaConfig.from_domains({"bio": bio}, reduction=4)
    get_peft_model(tiny("bert"), LoraConfig(target_modules=["query"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"holds a .*LORA adapter, not MixDA"):
        MixdaConfig.from_domains({"bio": tmp_path / "lora"})
    other, _ = saved_domain(tmp_path / "wide", reduction=4)
    with pytest.raises(ValueError, match="`reduction` is 8 in the domain 'bio' and 4 in 'law'"):
        MixdaConfig.from_domains({"bio": bio, "law": other})
    other, _ = saved_domain(tmp_path / "sum", mix_form="residual")
    with pytest.raises(ValueError, match=r"`mix_form` is 'mixture' .*from_domains\(..., mix_form=...\)"):
        MixdaConfig.from_domains({"bio": bio, "law": other})
    assert MixdaConfig.from_domains({"bio": bio, "law": other}, mix_form="mixture").mix_form == "mixture"
    other, _ = saved_domain(tmp_path / "one", domain_layers=[1])
    with pytest.raises(ValueError, match=r"domain 'law' .* lacks an adapter for 'bert.encoder.layer.0"):
        MixdaConfig.from_domains({"bio": bio, "law": other})

    base = tiny("llama")
    kinds = [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match=r"has no adapter of the domain 'bio' for 'model.layers\.0\.mlp.down_proj'"):
        config = MixdaConfig.from_domains({"bio": bio})
        config.target_modules, config.exclude_modules = {"down_proj"}, None
        get_peft_model(base, config)
    assert [type(module) for module in base.modules()] == kinds

    tensors = load_file(f"{law}/adapter_model.safetensors")
    cut = {key: value for key, value in tensors.items() if ".layer.1." not in key}
    save_file(cut, f"{law}/adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"has no adapter of the domain 'law' for 'bert\.encoder\.layer\.1"):
        get_peft_model(tiny("bert"), MixdaConfig.from_domains({"law": law}))
    save_file({key: value[:1] for key, value in tensors.items()}, f"{law}/adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit 'bert.encoder\.layer\.0"):
        get_peft_model(tiny("bert"), MixdaConfig.from_domains({"law": law}))


def test_another_base_is_refused(domains):
    bio, law = domains["bio"][0], domains["law"][0]
    for folder, name in ((bio, "some/bert"), (law, "other/bert")):
        path = f"{folder}/adapter_config.json"
        with open(path) as file:
            content = json.load(file)
        with open(path, "w") as file:
            json.dump(content | {"base_model_name_or_path": name}, file)
    with pytest.raises(ValueError, match="different base models: `some/bert` and `other/bert`"):
        MixdaConfig.from_domains({"bio": bio, "law": law})
    base = tiny("bert")
    base.name_or_path = "third/bert"
    with pytest.raises(ValueError, match="trained beside `some/bert`, and this model is `third/bert`"):
        get_peft_model(base, MixdaConfig.from_domains({"bio": bio}))
    base.name_or_path = "some/bert"
    model = get_peft_model(base, MixdaConfig.from_domains({"bio": bio}))
    before = outputs(model)
    with pytest.raises(ValueError, match="other/bert"):
        model.add_domain("law", law)
    assert torch.equal(outputs(model), before)


def test_domain_adapters_of_a_language_model_fit_the_classifier(domains):
    config = MixdaConfig.from_domains({"bio": domains["bio"][0]}, task_type="SEQ_CLS", task_reduction=4)
    model = get_peft_model(tiny("bert_labels"), config)
    assert trained(model) == {"gate", "task", "head"}
    mine, theirs = expert_tensors(model, "bio"), expert_tensors(domains["bio"][1], "domain")
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_a_task_step_changes_gate_task_and_head_only(domains):
    folders = {name: folder for name, (folder, _) in domains.items()}
    model = get_peft_model(
        tiny("bert_labels"), MixdaConfig.from_domains(folders, task_type="SEQ_CLS", task_reduction=4)
    )
    for _ in range(2):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        model.train()(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert any("_gate." in name for name in changed) and any("classifier" in name for name in changed)
        assert all("_gate." in n or "_task." in n or "classifier.modules_to_save" in n for n in changed)
        with model.disable_adapter():  # neither this nor what follows thaws the domains
            outputs(model)
        model.set_adapter("default")
        model.zero_grad()
    model.set_stage("default", "knowledge")
    assert trained(model) == {"expert", "gate", "head"}


def test_a_domain_is_added_to_a_live_model(domains):
    model = get_peft_model(tiny("bert"), MixdaConfig.from_domains({"bio": domains["bio"][0]}))
    perturb(model, "gate", seed=3)
    before = outputs(model)
    model.add_domain("law", domains["law"][0])
    assert model.peft_config["default"].domains == ["bio", "law"] and trained(model) == {"gate"}
    mine, theirs = expert_tensors(model, "law"), expert_tensors(domains["law"][1], "domain")
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert not torch.equal(outputs(model), before)
    model.set_domains(["bio"])
    torch.testing.assert_close(outputs(model), before)
    model.set_domains()
    model.remove_domain("law")
    assert torch.equal(outputs(model), before)
    with pytest.raises(ValueError, match="'law'"):
        model.remove_domain("law")
    with pytest.raises(ValueError, match=r"set_domains\(\[\]\)"):
        model.remove_domain("bio")


def test_domains_are_added_where_they_fit_only(domains, tmp_path):
    model = get_peft_model(tiny("bert"), MixdaConfig.from_domains({"bio": domains["bio"][0]}))
    before = outputs(model)
    one, _ = saved_domain(tmp_path / "one", domain_layers=[1])
    wide, _ = saved_domain(tmp_path / "wide", reduction=4)
    law = domains["law"][0]
    for name, folder, message in (
        ("bio", law, "already"),
        ("pop", law, "no attribute of a module"),
        ("law", one, "has no adapter of the domain 'law' for"),
        ("law", wide, "`reduction` is 4"),
        ("law", tmp_path / "nothing", "There is no"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_domain(name, folder)
        assert torch.equal(outputs(model), before) and model.peft_config["default"].domains == ["bio"]
    with pytest.raises(ValueError, match="`adapter_name` 'nobody'"):
        model.add_domain("law", law, adapter_name="nobody")
    plain = get_peft_model(tiny("bert"), MixdaConfig(domains=[], reduction=8, task_reduction=4))
    with pytest.raises(ValueError, match="made without domains"):
        plain.add_domain("law", law)


def test_with_all_domains_off_the_layer_is_the_base(domains):
    base = outputs(tiny("bert"))
    model = get_peft_model(tiny("bert"), MixdaConfig.from_domains({"bio": domains["bio"][0]}))
    assert not torch.equal(outputs(model), base)
    model.set_domains([])
    assert torch.equal(outputs(model), base)
    with pytest.raises(ValueError, match=r"some of \['bio'\], got 'law'"):
        model.set_domains(["law"])


def test_without_domains_it_is_a_single_task_adapter():
    model = get_peft_model(tiny("bert"), MixdaConfig(domains=[], task_reduction=4, stage="task"))
    assert trained(model) == {"task"} and torch.equal(outputs(model), outputs(tiny("bert")))


def test_two_adapters_may_share_a_domains_name(domains):
    model = get_peft_model(tiny("bert"), MixdaConfig.from_domains({"bio": domains["bio"][0]}), adapter_name="bio")
    first = outputs(model)
    model.add_adapter("law", hf_moe.MixdaConfig.from_domains({"bio": domains["law"][0]}))
    assert torch.equal(outputs(model), first)
    model.set_adapter("law")
    assert torch.equal(outputs(model), outputs(domains["law"][1]))


def test_weights_from_files_need_memory_to_go_to(domains):
    base = tiny("bert")
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        get_peft_model(base, MixdaConfig.from_domains({"bio": domains["bio"][0]}), low_cpu_mem_usage=True)
    assert torch.equal(outputs(base), outputs(tiny("bert")))
