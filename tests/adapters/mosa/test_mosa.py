"""MoSA in models: placement, sizes, collapsing, merging, stacked experts."""

import re
import warnings

import pytest
import torch
from common.adapter_cases import pixel_inputs, stacked_mosa, tiny_bert, tiny_llama, tiny_vit, token_inputs
from common.tiny_families import tiny_model
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import safe_open
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from hf_moe.adapters import MosaConfig
from hf_moe.adapters.core import Bottleneck
from hf_moe.adapters.mosa import collapse_adapter
from hf_moe.adapters.mosa.layer import MosaLayer


def tiny_swin():
    torch.manual_seed(0)
    config = SwinConfig(
        image_size=16,
        patch_size=2,
        num_channels=1,
        embed_dim=8,
        depths=[1, 2],
        num_heads=[2, 2],
        window_size=4,
        drop_path_rate=0.0,
    )
    return SwinForImageClassification(config).eval()


def tiny_opt(norm_first=True):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OPTConfig(vocab_size=64, word_embed_proj_dim=32, do_layer_norm_before=norm_first, dropout=0.0, **sizes)
    return OPTForCausalLM(config).eval()


def tiny_t5():
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8)
    ).eval()


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1)
    ).eval()


FAMILIES = {
    "vit": (tiny_vit, pixel_inputs),
    "swin": (tiny_swin, pixel_inputs),
    "bert": (tiny_bert, token_inputs),
    "llama": (tiny_llama, token_inputs),
    "gpt2": (tiny_gpt2, token_inputs),
    "opt": (tiny_opt, token_inputs),
    "opt-post-norm": (lambda: tiny_opt(False), token_inputs),
    "t5": (tiny_t5, token_inputs),
    "mixtral": (lambda: tiny_model("mixtral"), token_inputs),
}


def run(model, inputs=token_inputs, **kwargs):
    batch = {name: value for name, value in inputs().items() if name != "labels"} | kwargs
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"]
    with torch.no_grad():
        return model(**batch)[0]


def adapted_paths(model):
    return [name for name, module in model.base_model.model.named_modules() if isinstance(module, MosaLayer)]


@pytest.mark.parametrize("style", ["parallel", "pfeiffer", "houlsby", "lora", "residual"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_every_style(family, style):
    make, inputs = FAMILIES[family]
    base = make()
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    expected = run(base, inputs)
    fields = {"adapter_input": "residual"} if style == "residual" else {"style": style}
    model = get_peft_model(base, MosaConfig(r=4, **fields))
    assert len(adapted_paths(model)) >= 2
    assert torch.equal(run(model.train(), inputs), expected)  # a fresh adapter is the base
    assert torch.equal(run(model.eval(), inputs), expected)
    again = get_peft_model(model.unload(), MosaConfig(r=4, init_weights=False, **fields)).eval()
    assert not torch.allclose(run(again, inputs), expected)
    plain = again.unload()
    assert torch.equal(run(plain, inputs), expected)
    assert not any(module._forward_pre_hooks for module in plain.modules())


@pytest.mark.parametrize(
    "family, style, ends",
    [
        ("vit", "parallel", {"mlp"}),
        ("vit", "houlsby", {"attention", "mlp"}),
        ("swin", "lora", {"attention.q_proj", "attention.v_proj"}),
        ("bert", "parallel", {"output.dense"}),
        ("bert", "houlsby", {"attention.output.dense", "output.dense"}),
        ("llama", "houlsby", {"self_attn", "mlp"}),
        ("opt", "pfeiffer", {"fc2"}),
    ],
)
def test_styles_sit_where_they_belong(family, style, ends):
    model = get_peft_model(FAMILIES[family][0](), MosaConfig(r=4, style=style))
    paths = adapted_paths(model)
    inside = {re.sub(r"^.*?\.\d+\.(\D.*)$", r"\1", re.sub(r".*\.(?=\d+\.)", "x.", path)) for path in paths}
    assert inside == ends


def test_parallel_adapter_of_the_block_by_hand():
    base = tiny_vit()
    model = get_peft_model(base, MosaConfig(r=4, init_weights=False, layers_to_transform=[1])).eval()
    layer = next(module for module in model.modules() if isinstance(module, MosaLayer))
    seen = {}
    layer.register_forward_hook(lambda module, args, result: seen.update(x=args[0], result=result))
    run(model, pixel_inputs)
    cell = layer.cell("cell", "default")
    hidden = nn.functional.gelu(cell.down(cell.norm(seen["x"])))
    weight, bias = torch.stack([cell.up.expert(i)[0] for i in range(4)]).mean(0), cell.up.bias.mean(0)
    with torch.no_grad():
        expected = layer.base_layer(seen["x"]) + 0.1 * (hidden @ weight.T + bias)
        torch.testing.assert_close(seen["result"], expected)


@pytest.mark.parametrize("style, activation", [("pfeiffer", torch.relu), ("houlsby", nn.functional.silu)])
def test_sequential_adapters_by_hand(style, activation):
    model = get_peft_model(tiny_llama(), MosaConfig(r=4, style=style, init_weights=False)).eval()
    for layer in (module for module in model.modules() if isinstance(module, MosaLayer)):
        seen = []
        layer.register_forward_hook(lambda m, a, k, result, seen=seen: seen.append(result), with_kwargs=True)
        layer.base_layer.register_forward_hook(
            lambda m, a, k, result, seen=seen: seen.append(result), with_kwargs=True
        )
        run(model)
        output, result = (value[0] if isinstance(value, tuple) else value for value in seen)
        cell = layer.cell("cell", "default")
        with torch.no_grad():
            inner = output if style == "houlsby" else cell.norm(output)
            torch.testing.assert_close(result, output + 0.1 * cell.up(activation(cell.down(inner))))


@pytest.mark.parametrize("family", ["vit", "swin", "llama", "bert", "opt", "opt-post-norm", "t5", "gpt2"])
def test_residual_input_is_what_the_output_is_added_to(family):
    make, inputs = FAMILIES[family]
    model = get_peft_model(make(), MosaConfig(r=4, adapter_input="residual", init_weights=False)).eval()
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, MosaLayer))
    cell, seen = layer.cell("cell", "default"), {}
    cell.register_forward_hook(lambda module, args, result: seen.update(x=args[0], added=result))
    # with the feed-forward silenced, the layer's output is stream + adapter (before any norm that follows)
    owner = model.get_submodule(re.match(r".*\.\d+(?=\.)", name)[0])
    owner.register_forward_hook(lambda module, args, result: seen.update(out=result))
    base = layer.get_base_layer()
    with torch.no_grad():
        for module in base.modules():
            for parameter in module.parameters(recurse=False):
                parameter.zero_()
    run(model, inputs)
    out = seen["out"][0] if isinstance(seen["out"], tuple) else seen["out"]
    stream = (seen["x"] + seen["added"]).reshape(out.shape)
    if family == "bert":
        stream = owner.output.LayerNorm(stream)
    if family == "opt-post-norm":
        stream = owner.final_layer_norm(stream)
    torch.testing.assert_close(out, stream)
    assert layer.runtime.value is None  # activations are not kept


def test_residual_input_is_refused_where_no_norm_is_known():
    with pytest.raises(ValueError, match="adapter_input='block'"):
        get_peft_model(tiny_llama(), MosaConfig(target_modules=["down_proj"], adapter_input="residual"))


def test_mixed_batch_with_different_inputs_and_styles():
    model = get_peft_model(tiny_bert(), MosaConfig(r=4, init_weights=False))
    torch.manual_seed(5)
    model.add_adapter("second", MosaConfig(r=2, style="pfeiffer", num_experts=2, init_weights=False))
    model.eval()
    expected = []
    for row, name in enumerate(("second", "default")):
        model.set_adapter(name)
        expected.append(run(model)[row])
    torch.testing.assert_close(run(model, adapter_names=["second", "default"]), torch.stack(expected))


def test_one_expert_is_the_plain_adapter():
    model = get_peft_model(tiny_vit(), MosaConfig(num_experts=1, r=4))
    cells = [module.cell("cell", "default") for module in model.modules() if isinstance(module, MosaLayer)]
    assert cells and all(type(cell) is Bottleneck for cell in cells)


@pytest.mark.parametrize("rank, per_layer, total", [(64, 100672, 1208064), (16, None, 322752)])
def test_sizes_of_a_base_sized_vision_transformer(rank, per_layer, total, tmp_path):
    with torch.device("meta"):
        base = ViTModel(ViTConfig(), add_pooling_layer=False)
    plain = get_peft_model(base, MosaConfig(num_experts=1, r=rank), low_cpu_mem_usage=True)
    assert plain.get_nb_trainable_parameters()[0] == total
    layers = [module for module in plain.modules() if isinstance(module, MosaLayer)]
    assert len(layers) == 12
    if per_layer:
        assert sum(p.numel() for p in layers[0].cell("cell", "default").parameters()) == per_layer


def saved(model, folder):
    model.save_pretrained(folder)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}


@pytest.mark.parametrize(
    "fields", [{}, {"share": "none"}, {"style": "lora"}, {"style": "houlsby", "merge_scale": 2.0}]
)
def test_collapsed_adapter_is_saved_as_a_plain_one_and_reloads(fields, tmp_path):
    model = get_peft_model(tiny_llama(), MosaConfig(r=4, init_weights=False, **fields)).eval()
    expected = run(model)
    split = saved(model, tmp_path / "split")
    model.collapse_adapter("default")
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-6)
    plain = saved(model, tmp_path / "plain")
    fields = {name: value for name, value in fields.items() if name != "merge_scale"}
    standard = get_peft_model(tiny_llama(), MosaConfig(num_experts=1, r=4, **fields))
    assert plain == saved(standard, tmp_path / "standard") and plain != split
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("plain", "standard")]
    assert sizes[0] == sizes[1]
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain").eval()
    assert again.peft_config["default"].num_experts == 1
    assert torch.equal(run(again), run(model))
    assert torch.equal(run(PeftModel.from_pretrained(tiny_llama(), tmp_path / "split").eval()), expected)
    model.collapse_adapter("default")  # nothing left to do
    model.train()
    model(**token_inputs()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_collapsing_one_adapter_leaves_the_others_and_names_unknown_ones():
    model = get_peft_model(tiny_llama(), MosaConfig(r=4, init_weights=False))
    model.add_adapter("second", MosaConfig(r=4, init_weights=False))
    model.eval().set_adapter("second")
    before = run(model)
    model.collapse_adapter("default")
    assert torch.equal(run(model), before) and model.peft_config["second"].num_experts == 4
    with pytest.raises(ValueError, match="one of the MoSA adapters"):
        model.collapse_adapter("third")


def test_a_model_with_an_adapter_of_its_own_collapses_too(tmp_path):
    model = tiny_llama()
    model.add_adapter(MosaConfig(r=4, init_weights=False), adapter_name="mine")
    expected = run(model.eval())
    collapse_adapter(model, "mine")
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = tiny_llama()
    again.load_adapter(str(tmp_path))
    assert torch.equal(run(again.eval()), run(model))


@pytest.mark.parametrize("share", ["down", "up", "none"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_form_merges_into_the_base(family, share):
    base = FAMILIES[family][0]()
    model = get_peft_model(base, MosaConfig(style="lora", share=share, r=4, init_weights=False)).eval()
    expected = run(model)
    layer = next(module for module in model.modules() if isinstance(module, MosaLayer))
    cell = layer.cell("cell", "default")
    up, down = (f.merged()[0] if hasattr(f, "assign") else f.weight for f in (cell.up, cell.down))
    torch.testing.assert_close(layer.delta_weight("default"), up @ down)
    merged = model.merge_and_unload()
    torch.testing.assert_close(run(merged), expected, rtol=1e-5, atol=1e-5)


def test_merging_in_training_mode_merges_the_mean():
    model = get_peft_model(tiny_llama(), MosaConfig(style="lora", r=4, init_weights=False))
    expected = run(model.eval())
    torch.testing.assert_close(run(model.train().merge_and_unload()), expected, rtol=1e-5, atol=1e-5)


def test_lora_form_becomes_lora():
    model = get_peft_model(tiny_llama(), MosaConfig(style="lora", r=4, init_weights=False)).eval()
    expected = run(model)
    config, weights = convert_to_lora(model, rank=4)
    assert isinstance(config, LoraConfig)
    lora = get_peft_model(tiny_llama(), config).eval()
    assert not set_peft_model_state_dict(lora, weights).unexpected_keys
    torch.testing.assert_close(run(lora), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(get_peft_model(tiny_llama(), MosaConfig(r=4)), rank=4)


def test_stacked_experts_train_one_expert_of_the_adapter_and_evaluate_the_mean(monkeypatch):
    model = get_peft_model(tiny_model("mixtral"), stacked_mosa(init_weights=False))
    expected = run(model.eval())
    layers = [module for module in model.modules() if isinstance(module, MosaLayer)]
    assert {layer.cell("cell", "default").up.weight.ndim for layer in layers} == {3}
    for index in range(4):
        for layer in layers:
            split = layer.cell("cell", "default").up
            monkeypatch.setattr(split, "draw", lambda index=index: torch.tensor([index]))
        model.zero_grad()
        model.train()(**token_inputs()).loss.backward()
        for layer in layers:
            split = layer.cell("cell", "default").up
            assert split.weight.grad.any() and not split.weight.grad[split.assign != index].any()
    model.eval().collapse_adapter("default")
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(run(model.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)


def test_transposed_stacked_experts_are_recognised():
    model = tiny_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    wide = experts.down_proj.shape  # (E, D, I)
    experts.is_transposed = True
    adapted = get_peft_model(
        model, MosaConfig(style="lora", r=2, target_modules=[], target_parameters=["layers.0.mlp.experts.down_proj"])
    )
    layer = next(module for module in adapted.modules() if isinstance(module, MosaLayer))
    assert layer.cell("cell", "default").down.weight.shape == (wide[0], 2, wide[1])
    assert layer.delta_weight("default").shape == wide


def test_adapters_of_a_model_are_dealt_out_differently_and_reproducibly():
    model = get_peft_model(tiny_llama(), MosaConfig(r=4))
    maps = {k: v for k, v in get_peft_model_state_dict(model).items() if k.endswith("assign")}
    assert len(maps) == 2 and not torch.equal(*maps.values())
    plain = tiny_llama()
    plain.add_adapter(MosaConfig(r=4))
    again = [v for k, v in plain.state_dict().items() if k.endswith("assign")]
    assert all(any(torch.equal(a, b) for b in maps.values()) for a in again)
    other = get_peft_model_state_dict(get_peft_model(tiny_llama(), MosaConfig(r=4, mask_seed=1)))
    assert not any(torch.equal(other[key], value) for key, value in maps.items())


def test_training_compiles_without_breaks_and_draws_differently():
    model = get_peft_model(tiny_llama(), MosaConfig(r=4, init_weights=False, dropout=0.0)).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.manual_seed(0)
    results = {compiled(**token_inputs()).loss.item() for _ in range(12)}
    assert len(results) > 4
    torch.manual_seed(0)
    loss = model(**token_inputs()).loss.item()
    assert any(abs(loss - value) < 1e-5 for value in results)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_two_calls_before_one_backward(reentrant):
    model = get_peft_model(tiny_llama(), MosaConfig(r=4, share="none", init_weights=False)).train()

    def gradients():
        model.zero_grad()
        torch.manual_seed(3)
        losses = [model(**token_inputs()).loss for _ in range(2)]
        assert losses[0] != losses[1]
        sum(losses).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(), expected, rtol=0, atol=1e-6)


def test_a_block_after_lora_on_its_children_is_exact():
    base = get_peft_model(tiny_llama(), LoraConfig(target_modules=["gate_proj"], init_lora_weights=False)).eval()
    expected = run(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that there is a second adapter
        outer = get_peft_model(base.base_model.model, MosaConfig(r=4), adapter_name="sparse").eval()
    assert torch.equal(run(outer), expected)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_experts": 0}, "`num_experts` must be between 1 and 256, got 0"),
        ({"style": "serial"}, "`style` must be one of"),
        ({"share": "all"}, "`share` must be one of"),
        ({"r": 0}, "`r` must be at least 1"),
        ({"dropout": 1.0}, "`dropout`"),
        ({"merge_scale": 0.0}, "`merge_scale` must be positive"),
        ({"num_experts": 1, "merge_scale": 2.0}, "`merge_scale` must be 1.0"),
        ({"style": "lora", "layernorm": True}, "`layernorm` cannot be used"),
        ({"style": "houlsby", "adapter_input": "residual"}, "reads the output of the block"),
        ({"adapter_input": "norm"}, "`adapter_input` must be"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "needs `style='lora'`"),
        ({"style": "lora", "dropout": 0.1, "target_parameters": ["w"]}, "`dropout` must be 0"),
        ({"consistency_weight": -1.0}, "`consistency_weight`"),
        ({"second_ce_weight": -1.0}, "`second_ce_weight`"),
        ({"feature_weight": -1.0}, "`feature_weight`"),
    ],
)
def test_wrong_settings_are_refused_at_construction(fields, message):
    with pytest.raises(ValueError, match=message):
        MosaConfig(**fields)


def test_lora_form_on_a_block_and_sizes_too_small_are_refused():
    with pytest.raises(ValueError, match="adapts linear layers"):
        get_peft_model(tiny_llama(), MosaConfig(style="lora", target_modules=["mlp"]))
    with pytest.raises(ValueError, match="`num_experts` must be between 1 and 32"):
        get_peft_model(tiny_llama(), MosaConfig(r=1, num_experts=64))
