"""What every adapter type must do, as PEFT's own types do it. A type takes part by its line in `adapter_cases`."""

import copy
import json
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from common.adapter_cases import CASES, tiny_llama
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_moe.adapters import config_classes
from hf_moe.adapters.core import runtime_of


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request):
    return request.param


def adapted(case, seed=0, **fields):
    """The base with one adapter whose random weights show."""
    base = case.model()
    torch.manual_seed(seed)
    return get_peft_model(base, case.config(init_weights=False, **fields)).eval()


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_every_type_takes_part():
    assert {cls.type_name for cls in config_classes()} <= {case.config().type_name for case in CASES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_adapter_is_the_base(case, dtype):
    base = case.model().to(dtype)
    expected = case.base_output(base)
    model = get_peft_model(base, case.config()).eval()
    got = case.output(model)
    assert got.dtype == expected.dtype and torch.isfinite(got).all()
    if case.starts_as_base:
        assert torch.equal(got, expected)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_random_weights_change_the_output(case):
    assert not torch.allclose(case.output(adapted(case)), case.base_output(case.model()))


@pytest.mark.parametrize("name", ["default", "other", "cell", "hfmoe"])
def test_saved_adapter_reloads_under_any_name(case, name, tmp_path):
    model = adapted(case)
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} <= {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert (tmp_path / "README.md").read_text().count("import hf_moe") == 1  # how to load it
    again = PeftModel.from_pretrained(case.model(), tmp_path, adapter_name=name, low_cpu_mem_usage=name == "other")
    assert torch.equal(case.output(again.eval()), case.output(model))
    assert not trainable(again)
    saved, loaded = get_peft_model_state_dict(model), get_peft_model_state_dict(again, adapter_name=name)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    prefix = case.config().type_name.lower() + "_"
    assert all(f".{prefix}" in key for key in saved)
    assert name != "other" or not any(name in key.split(".") for key in loaded)


def test_config_survives_its_json(case, tmp_path):
    config = case.config()
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is type(config)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == config.type_name
    assert {k: v for k, v in again.to_dict().items() if k != "inference_mode"} == {
        k: v for k, v in config.to_dict().items() if k != "inference_mode"
    }
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # PEFT, on the second adapter
def test_transformers_adds_loads_switches_and_deletes(case, tmp_path):
    if not isinstance(case.model(), PreTrainedModel):
        return
    model = adapted(case)
    model.save_pretrained(tmp_path / "peft")
    plain = case.model()
    expected = case.base_output(plain)
    plain.load_adapter(str(tmp_path / "peft"), adapter_name="mine")
    assert torch.equal(case.output(plain.eval()), case.output(model))
    plain.save_pretrained(tmp_path / "transformers")
    other = case.model()
    other.load_adapter(str(tmp_path / "transformers"), adapter_name="again")
    assert torch.equal(case.output(other.eval()), case.output(model))
    plain.add_adapter(case.config(), adapter_name="fresh")
    plain.eval()
    if case.starts_as_base:
        plain.set_adapter("fresh")
        assert torch.equal(case.output(plain), expected)
        plain.set_adapter("mine")
        assert torch.equal(case.output(plain), case.output(model))
        plain.disable_adapters()
        assert torch.equal(case.output(plain), expected)
        plain.enable_adapters()
    plain.set_adapter("fresh")
    plain.delete_adapter("mine")
    assert plain.active_adapters() == ["fresh"]


def test_injection_without_a_wrapper(case):
    model = adapted(case)
    plain = inject_adapter_in_model(case.config(), case.model(), adapter_name="direct").eval()
    result = set_peft_model_state_dict(plain, get_peft_model_state_dict(model), adapter_name="direct")
    assert not result.unexpected_keys
    assert torch.equal(case.output(plain), case.output(model))


def test_disabling_and_unloading_give_the_base_back(case):
    base = case.model()
    kinds = [type(module) for module in base.modules()]
    torch.manual_seed(0)
    model = get_peft_model(base, case.config(init_weights=False)).eval()
    expected = case.model()
    with model.disable_adapter():
        disabled = case.output(model)
    weights = {name: value.clone() for name, value in expected.state_dict().items()}
    plain = model.unload()
    assert [type(module) for module in plain.modules()] == kinds
    assert runtime_of(plain) is None and not plain._forward_pre_hooks
    assert plain.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in plain.state_dict().items())
    assert torch.equal(disabled, case.base_output(expected))
    assert torch.equal(case.base_output(plain), disabled)


def test_merging_keeps_the_output_or_is_refused(case):
    model = adapted(case)
    expected = case.output(model)
    if not case.mergeable:
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(NotImplementedError, match="unload"):
                merge()
            assert torch.equal(case.output(model), expected)
        return
    model.merge_adapter()
    torch.testing.assert_close(case.output(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(case.output(model), expected, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(hasattr(module, "base_layer") for module in merged.modules())
    torch.testing.assert_close(case.output(merged), expected, rtol=1e-4, atol=1e-5)


def test_several_adapters_are_kept_apart(case):
    model = adapted(case)
    first = case.output(model)
    torch.manual_seed(7)
    model.add_adapter("second", case.config(init_weights=False))
    assert torch.equal(case.output(model.eval()), first)
    model.set_adapter("second")
    second = case.output(model)
    assert not torch.equal(first, second)
    assert trainable(model) and all(".second." in name or name.endswith(".second") for name in trainable(model))
    model.set_adapter("default")
    assert torch.equal(case.output(model), first)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(case.output(model), second)
    assert "default" not in model.peft_config
    with pytest.raises(ValueError, match="does not exist"):
        model.base_model.delete_adapter("default")


def test_mixed_batch_equals_rows_alone(case):
    model = adapted(case)
    torch.manual_seed(7)
    model.add_adapter("second", case.config(init_weights=False))
    model.eval()
    if not case.mixed:
        with pytest.raises(ValueError, match="adapter_names"):
            case.output(model, adapter_names=["second", "default"])
        return
    expected = {}
    for name in ("second", "default"):
        model.set_adapter(name)
        expected[name] = case.output(model)
    mixed = case.output(model, adapter_names=["second", "default"])
    torch.testing.assert_close(mixed[0], expected["second"][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], expected["default"][1], rtol=1e-4, atol=1e-5)
    mixed = case.output(model, adapter_names=["__base__", "default"])
    with model.disable_adapter():
        torch.testing.assert_close(mixed[0], case.output(model)[0], rtol=1e-4, atol=1e-5)
    for names, message in (
        (["default", "nobody"], "non-existing adapter"),
        (["default"], "Length of `adapter_names`"),
    ):
        with pytest.raises(ValueError, match=message):
            case.output(model, adapter_names=names)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        case.output(model, adapter_names=["default", "default"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(case, reentrant):
    model = adapted(case).train()
    base = model.base_model.model
    if not isinstance(base, PreTrainedModel):
        return

    def gradients():
        model.zero_grad()
        torch.manual_seed(3)  # dropout and stochastic activation
        case.loss(model).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    assert expected
    if getattr(base, "get_input_embeddings", None) is not None and "input_ids" in case.inputs():
        model.enable_input_require_grads()
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-6)


def test_compiled_model_gives_the_same(case):
    model = adapted(case)
    torch.compiler.reset()  # other tests have compiled the same code for other modules
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(case.output(compiled), case.output(model), rtol=1e-4, atol=1e-5)


def test_copies_are_independent(case):
    model = adapted(case)
    expected = case.output(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(case.output(other), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert torch.equal(case.output(model), expected)


def test_frozen_containers_stay_frozen(case):
    if not case.stages:
        return
    every = trainable(get_peft_model(case.model(), case.config()))
    for stage in case.stages:
        model = get_peft_model(case.model(), case.config(stage=stage))
        some = trainable(model)
        assert some and some != every
        with model.disable_adapter():
            pass
        model.set_adapter("default")
        assert trainable(model) == some
        model.set_stage("default", stage)
        assert trainable(model) == some


def test_trainer_trains_only_the_adapter_and_the_loss_falls(case, tmp_path):
    model = get_peft_model(case.model(), case.config())
    if not isinstance(model.base_model.model, PreTrainedModel):
        return
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = trainable(model)
    model.eval()
    first = case.loss(model).item()
    batch = case.inputs()
    rows = [{name: value[row] for name, value in batch.items()} for row in range(2)]
    arguments = TrainingArguments(
        tmp_path, max_steps=12, learning_rate=2e-2, report_to=[], save_strategy="no", logging_steps=100, use_cpu=True,
        disable_tqdm=True, remove_unused_columns=False, per_device_train_batch_size=2, seed=0,
    )  # fmt: skip
    with case.within(model):
        Trainer(model, arguments, train_dataset=rows).train()
    model.eval()
    assert case.loss(model).item() < first
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and changed <= names
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_generation_with_a_cache_equals_without(case):
    if not case.generates:
        return
    model = adapted(case)
    ids = case.inputs()["input_ids"]
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    with case.within(model):
        cached = model.generate(input_ids=ids, **settings)
        assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **settings))
        assert model.generate(input_ids=ids, num_beams=2, **settings).shape[0] == 2


def test_hotswapping_is_refused(case, tmp_path):
    model = adapted(case)
    model.save_pretrained(tmp_path)
    expected = case.output(model)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")
    assert torch.equal(case.output(model), expected)


def test_unknown_targets_are_refused(case):
    with pytest.raises(ValueError, match=r"Target modules .* not found"):
        get_peft_model(case.model(), case.config(target_modules=["no_such_module"]))


def test_other_modules_can_be_trained_along(tmp_path):
    for case in CASES:
        if case.model is not tiny_llama:
            continue
        model = adapted(case, modules_to_save=["lm_head"])
        with torch.no_grad():
            model.base_model.model.lm_head.weight.mul_(2.0)
        folder = tmp_path / case.name
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(tiny_llama(), folder).eval()
        assert torch.equal(case.output(again), case.output(model)), case.name


def test_layers_can_be_chosen():
    for case in CASES:
        targets = get_peft_model(case.model(), case.config()).peft_config["default"].target_modules
        if case.model is not tiny_llama or isinstance(targets, str):
            continue
        model = get_peft_model(tiny_llama(), case.config(layers_to_transform=[1]))
        assert trainable(model) and all(".layers.1." in name for name in trainable(model)), case.name


def test_targets_can_be_a_regular_expression():
    for case in CASES:
        named = get_peft_model(case.model(), case.config())
        targets = named.peft_config["default"].target_modules
        if case.model is not tiny_llama or isinstance(targets, str) or not targets:
            continue
        pattern = rf".*\.({'|'.join(sorted(name.rpartition('.')[2] for name in targets))})"
        model = get_peft_model(tiny_llama(), case.config(target_modules=pattern))
        assert trainable(model) >= trainable(named), case.name  # MixDA chooses among named layers only


def test_all_linear_is_every_linear_but_the_head_or_refused():
    for name in ("toy_linear", "mosa_lora"):
        case = next(case for case in CASES if case.name == name)
        model = get_peft_model(tiny_llama(), case.config(target_modules="all-linear"))
        adapted_names = {name.partition(".hfmoe_")[0].rpartition(".")[2] for name in trainable(model)}
        assert adapted_names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    pill = next(case for case in CASES if case.name == "pill")
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(tiny_llama(), pill.config(target_modules="all-linear"))


FRESH_PROCESS = """
import sys
{first}
from transformers import LlamaForCausalLM
for folder in sys.argv[2:]:
    model = LlamaForCausalLM.from_pretrained(sys.argv[1])
    try:
        model.load_adapter(folder, adapter_name=folder.rpartition("/")[2])
        print("loaded")
    except KeyError as error:
        print("KeyError", error)
"""


def test_a_fresh_process_needs_only_the_import(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    folders = []
    for case in CASES:
        if case.model is tiny_llama and not case.name.startswith("toy"):
            folders.append(tmp_path / case.name)
            adapted(case).save_pretrained(folders[-1])
    for first, expected in (("import hf_moe", "loaded"), ("", "KeyError 'HFMOE_")):
        script = textwrap.dedent(FRESH_PROCESS.format(first=first))
        command = [sys.executable, "-c", script, str(tmp_path / "base"), *map(str, folders)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
        assert [line.startswith(expected) for line in done.stdout.splitlines()] == [True] * len(folders), done.stdout
