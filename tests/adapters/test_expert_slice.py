import subprocess
import sys

import peft
import pytest
import torch
from common.expert_training import EXPERT, LAYER, Masked, Spliced, batch, loss_of, trained, view_of, weights
from common.tiny_families import tiny_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_moe
from hf_moe import ExpertSliceConfig, moe_layers, record_routing
from hf_moe.adapters.expert_slice import BankLayer, SliceLayer, bypass_slices


TESTED = ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "moe_llama", "moe_plus_plus")
OTHERS = (
    *("afmoe", "aria_text", "bailing_hybrid", "deepseek_v2", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe"),
    *("flex_olmo", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "granitemoe", "granitemoe_swa", "granitemoehybrid"),
    *("granitemoeshared", "hunyuan_v1_moe", "hy_v3", "jamba", "lfm2_moe", "mellum", "mimo_v2_flash", "minimax"),
    *("minimax_m2", "mistral4", "nemotron_h", "olmoe", "phimoe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next"),
    *("qwen3_vl_moe_text", "solar_open", "moe_gpt2", "moe_qwen2", "moe_qwen3"),
)
NAME = f"model.layers.{LAYER}.mlp"


def sliced(model, layers=None, **options):
    return peft.get_peft_model(model, ExpertSliceConfig(layers=layers or {NAME: [EXPERT]}, **options))


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def scramble(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=batch(), use_cache=False)[0]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("family", TESTED)
def test_masking_splicing_and_the_slice_give_the_same_weights(family, optimizer):
    options = {"weight_decay": 0.0} if optimizer is torch.optim.AdamW else {}
    masked, splice, side = (tiny_model(family) for _ in range(3))
    start = weights(masked)
    trained(masked, Masked(masked).parameters, optimizer, **options)
    trained(splice, Spliced(splice).parameters, optimizer, **options)
    side = sliced(side)
    trained(side, trainable(side), optimizer, **options)
    expected, spliced, got = weights(masked), weights(splice), weights(side.merge_and_unload())
    for name, value in expected.items():
        assert torch.equal(spliced[name], value), name
        torch.testing.assert_close(got[name], value, rtol=0, atol=2e-7)
        if name.startswith("bank"):
            others = [expert for expert in range(len(value)) if expert != EXPERT]
            assert torch.equal(got[name][others], start[name][others])
            assert not torch.equal(got[name][EXPERT], start[name][EXPERT])


def test_weight_decay_moves_frozen_experts_of_a_masked_bank_but_not_beside_a_slice():
    masked, side = tiny_model("mixtral"), tiny_model("mixtral")
    start = weights(masked)
    trained(masked, Masked(masked).parameters, torch.optim.AdamW, weight_decay=0.1)
    side = sliced(side)
    trained(side, trainable(side), torch.optim.AdamW, weight_decay=0.1)
    others = [expert for expert in range(8) if expert != EXPERT]
    name = "bank.gate_up_proj"
    assert not torch.equal(weights(masked)[name][others], start[name][others])
    assert torch.equal(weights(side.merge_and_unload())[name][others], start[name][others])


@pytest.mark.parametrize("family", TESTED)
def test_optimizer_state_is_that_of_one_expert(family):
    masked, side = tiny_model(family), sliced(tiny_model(family), train_router=False)
    view = view_of(masked)
    router = {id(parameter) for parameter in view.router.parameters()}
    bank = [parameter for parameter in Masked(masked).parameters if id(parameter) not in router]

    def state_bytes(optimizer):
        tensors = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    whole = state_bytes(trained(masked, bank, torch.optim.AdamW, steps=1))
    one = state_bytes(trained(side, trainable(side), torch.optim.AdamW, steps=1))
    assert 0 < one * view.num_computing_experts <= whole


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "hf_moe"])
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if family in ("mixtral", "gpt_oss", "moe_plus_plus") else pytest.mark.slow)
        for family in TESTED
    ],
)
def test_every_way_to_run_experts_gives_the_same(family, implementation):
    expected = scramble(sliced(tiny_model(family)))
    model = tiny_model(family)
    model.set_experts_implementation(implementation)
    base = logits(model)
    model = sliced(model)
    torch.testing.assert_close(logits(model), base, rtol=0, atol=1e-6)
    scramble(model)
    loss_of(expected).backward()
    loss_of(model).backward()
    for got, parameter in zip(trainable(model), trainable(expected), strict=True):
        torch.testing.assert_close(got.grad, parameter.grad, rtol=1e-3, atol=1e-6)
    after = logits(model)
    torch.testing.assert_close(after, logits(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload()), after, rtol=0, atol=1e-6)


def every_family():
    for family in OTHERS:
        yield pytest.param(family, marks=[] if family in ("aria_text", "nemotron_h", "phimoe") else pytest.mark.slow)


@pytest.mark.parametrize("family", list(every_family()))
def test_every_family_has_slices(family):
    model = tiny_model(family)
    base, last = logits(model), moe_layers(model)[-1]
    model = sliced(model, {last.name: [0, 5]})
    torch.testing.assert_close(logits(model), base, rtol=0, atol=1e-6)
    after = logits(scramble(model))
    assert not torch.allclose(after, base, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    torch.testing.assert_close(logits(model.merge_and_unload()), after, rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", ["llama4_text", "longcat_flash", "step3p7_text"])
def test_experts_with_another_contract_are_refused(family):
    model = tiny_model(family)
    modules = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="are not stacked as transformers' experts contract has them"):
        sliced(model, {moe_layers(model)[-1].name: [0]})
    assert [type(module) for module in model.modules()] == modules


def test_without_tokens_the_slice_has_gradient_zero_and_not_none():
    model = tiny_model("gpt_oss")
    with torch.no_grad():
        view_of(model).router.bias[EXPERT] = -1e4
    model = sliced(model)
    loss_of(model).backward()
    slices = {name: p.grad for name, p in model.named_parameters() if "slice_bank" in name and p.requires_grad}
    assert len(slices) == 4 and all(gradient is not None and not gradient.any() for gradient in slices.values())


@pytest.mark.parametrize("train_router", [True, False])
def test_the_adapter_file_holds_the_slices_and_nothing_else(train_router, tmp_path):
    model = sliced(tiny_model("mixtral"), {LAYER: [1, 4]}, train_router=train_router)
    model.save_pretrained(tmp_path)
    path = f"base_model.model.{NAME}"
    expected = {
        f"{path}.experts.hfmoe_expert_slice_bank.gate_up_proj": (2, 64, 32),
        f"{path}.experts.hfmoe_expert_slice_bank.down_proj": (2, 32, 32),
    }
    if train_router:
        expected[f"{path}.gate.hfmoe_expert_slice_router.weight"] = (8, 32)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == expected
    again = peft.PeftModel.from_pretrained(tiny_model("mixtral"), tmp_path)
    assert again.peft_config["default"].layers == {NAME: [1, 4]}  # a position is saved as the name


def test_merged_weights_are_saved_as_the_family_saves_them_and_load_without_the_plugin(tmp_path):
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "base")
    merged = scramble(sliced(model)).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    base, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    assert {k: v.shape for k, v in base.items()} == {k: v.shape for k, v in after.items()}
    changed = sorted(name for name in base if not torch.equal(base[name], after[name]))
    block = f"model.layers.{LAYER}.block_sparse_moe"
    assert changed == [f"{block}.experts.{EXPERT}.{w}.weight" for w in ("w1", "w2", "w3")] + [f"{block}.gate.weight"]
    torch.save(logits(merged), tmp_path / "expected.pt")
    code = f"""
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "merged")!r})
ids = torch.randint(3, 384, (2, 9), generator=torch.Generator().manual_seed(0))
expected = torch.load({str(tmp_path / "expected.pt")!r})
assert torch.equal(model(input_ids=ids, use_cache=False)[0], expected) and "hf_moe" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "moe_llama", "moe_plus_plus"])
def test_merged_models_of_other_families_reload(family, tmp_path):
    merged = scramble(sliced(tiny_model(family))).merge_and_unload()
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))


def test_changes_of_two_adapters_to_one_expert_add_up():
    base = tiny_model("mixtral")
    start, before = weights(base), logits(base)
    model = sliced(base)
    model.add_adapter("second", ExpertSliceConfig(layers={NAME: [EXPERT, 5]}))
    scramble(model, 1)
    model.set_adapter("second")
    scramble(model, 2)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both, rtol=0, atol=1e-6)
    bank = next(m for m in model.modules() if isinstance(m, BankLayer))
    first = bank.cell("bank", "default")["gate_up_proj"][0]
    second = bank.cell("bank", "second")["gate_up_proj"]
    base_value = start["bank.gate_up_proj"]
    merged = weights(model)["bank.gate_up_proj"]
    torch.testing.assert_close(merged[EXPERT], first + second[0] - base_value[EXPERT])
    assert torch.equal(merged[5], second[1])
    model.unmerge_adapter()
    assert all(torch.equal(weights(model)[name], value) for name, value in start.items())
    assert torch.equal(logits(model), both)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        model.merge_adapter(["second"])  # one after the other
    assert torch.equal(weights(model)["bank.gate_up_proj"], merged)
    assert torch.equal(logits(model.unload()), logits(model.get_base_model()))
    assert not torch.equal(before, both)


def test_a_broken_slice_is_not_merged():
    base = tiny_model("mixtral")
    start = weights(base)
    model = sliced(base)
    with torch.no_grad():
        trainable(model)[0].fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(weights(model)[name], value) for name, value in start.items())


def test_bypassing_gives_the_base_between_forward_and_backward():
    base = tiny_model("mixtral")
    expected = logits(base)
    model = scramble(sliced(base))
    loss = loss_of(model)
    with bypass_slices(model):
        assert torch.equal(logits(model), expected)
    loss.backward()
    assert all(parameter.grad is not None for parameter in trainable(model))
    assert not torch.equal(logits(model), expected)


def test_recorded_routing_is_that_of_the_trained_router():
    model = scramble(sliced(tiny_model("mixtral")))
    with record_routing(model) as recorder:
        after = logits(model)
    view = view_of(model)
    weight = next(p for name, p in model.named_parameters() if "slice_router" in name)
    with torch.no_grad(), bypass_slices(model):
        inputs = []
        handle = view.router.register_forward_hook(lambda _m, args, _o: inputs.append(args[0]))
        logits(model)
        handle.remove()
    recorded = recorder.layers[view.index].router_logits[0]
    torch.testing.assert_close(recorded, inputs[0].reshape(-1, 32) @ weight.T)  # nothing below it has changed
    assert after.shape[0] == 2 and len(moe_layers(model)) == 4


def test_a_slice_learns_in_half_precision_from_single_precision_copies():
    model = sliced(tiny_model("mixtral").bfloat16())
    assert {parameter.dtype for parameter in trainable(model)} == {torch.float32}
    before = loss_of(model).item()
    trained(model, trainable(model), torch.optim.AdamW, steps=10)
    assert loss_of(model).item() < before
    after = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), after, rtol=2e-2, atol=2e-2)


def test_rows_of_a_batch_cannot_have_different_adapters():
    model = sliced(tiny_model("mixtral")).eval()
    with pytest.raises(ValueError, match="`adapter_names` cannot be used with expert slices"):
        model(input_ids=batch(), adapter_names=["default", "__base__"])


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ({}, ValueError, "`layers` must name the experts to train"),
        ([3], TypeError, "`layers` must map layers to lists"),
        ({3: 1}, TypeError, r"`layers\[3\]` must be a list of expert numbers"),
        ({3: []}, ValueError, "must be different numbers from 0 on"),
        ({3: [1, 1]}, ValueError, "must be different numbers from 0 on"),
        ({3: [-1]}, ValueError, "must be different numbers from 0 on"),
    ],
)
def test_configs_that_cannot_work_are_refused(layers, error, message):
    with pytest.raises(error, match=message):
        ExpertSliceConfig(layers=layers)


@pytest.mark.parametrize(
    ("family", "layers", "message"),
    [
        ("deepseek_v3", {"model.layers.0.mlp": [0]}, "which has no routed experts. Its 3 MoE layers"),
        ("mixtral", {"model.layer.3.mlp": [0]}, r"which the model does not have.* look like 'model.layers.3.mlp'"),
        ("mixtral", {4: [0]}, "numbered from 0 to 3"),
        ("mixtral", {3: [7, 8]}, r"has the experts \[8\]; this layer's routed experts with weights are 0 to 7"),
        ("moe_plus_plus", {3: [8]}, r"has the experts \[8\]"),  # a zero-computation expert
        ("mixtral", {3: [0], NAME: [1]}, "twice, by name and by position"),
    ],
)
def test_what_the_model_does_not_have_is_refused_and_the_model_is_as_it_was(family, layers, message):
    model = tiny_model(family)
    before, modules = {n: p.requires_grad for n, p in model.named_parameters()}, [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        sliced(model, layers)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert [type(m) for m in model.modules()] == modules


def test_a_dense_model_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="has no MoE layer"):
        sliced(tiny_llama, {0: [0]})
    assert not any(isinstance(module, SliceLayer) for module in tiny_llama.modules())


def test_the_top_level_has_the_config():
    assert hf_moe.ExpertSliceConfig is ExpertSliceConfig
    model = sliced(tiny_model("mixtral"))
    assert sum(t.numel() for t in get_peft_model_state_dict(model).values()) == 64 * 32 + 32 * 32 + 8 * 32
