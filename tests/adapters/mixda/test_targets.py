"""Which modules of an architecture get domain adapters."""

import pytest
import torch
from common.mixda_models import IDS, MASK, perturb, tiny
from peft import get_peft_model

from hf_moe import MixdaConfig
from hf_moe.adapters.mixda import MixdaLayer


def adapted_paths(model):
    start = "base_model.model."
    return {name.removeprefix(start): m for name, m in model.named_modules() if isinstance(m, MixdaLayer)}


@pytest.mark.parametrize(
    "family, pattern",
    [
        ("bert", "bert.encoder.layer.{}.output.dense"),
        ("roberta", "roberta.encoder.layer.{}.output.dense"),
        ("llama", "model.layers.{}.mlp.down_proj"),
        ("gpt2", "transformer.h.{}.mlp.c_proj"),
        ("opt", "model.decoder.layers.{}.fc2"),
        ("t5", "encoder.block.{0}.layer.1.DenseReluDense.wo decoder.block.{0}.layer.2.DenseReluDense.wo"),
    ],
)
def test_the_last_linear_map_of_the_feed_forward_network_is_found(family, pattern):
    model = get_peft_model(tiny(family), MixdaConfig(domain_layers=[0, 1], reduction=8))
    found = adapted_paths(model)
    assert set(found) == {path for layer in (0, 1) for path in pattern.format(layer).split()}
    for layer in found.values():
        assert (layer.in_features, layer.out_features) == (48, 32)
        expert = layer.cell("expert", "default")["domain"]
        assert tuple(expert.down.weight.shape) == (6, 48) and tuple(expert.up.weight.shape) == (32, 6)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_attentions_output_is_left_out_when_its_name_ends_alike(family):
    model = get_peft_model(tiny(family), MixdaConfig(target_modules=["output.dense"], domain_layers=[0, 1]))
    assert not any("attention" in path for path in adapted_paths(model))
    by_name = MixdaConfig(target_modules=["attention.output.dense"], domain_layers=[0, 1])
    assert all("attention" in path for path in adapted_paths(get_peft_model(tiny(family), by_name)))


def test_layers_are_the_papers_in_proportion_and_the_task_adapter_is_everywhere():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 8}
    for layers, expected in ((24, [7, 11]), (12, [3, 5]), (6, [1, 2]), (1, [0])):
        base = BertModel(BertConfig(num_hidden_layers=layers, **sizes))
        model = get_peft_model(base, MixdaConfig(task_reduction=4))
        config = model.peft_config["default"]
        assert config.domain_layers == expected
        found = list(adapted_paths(model).values())
        assert [bool(layer.cell("expert", "default")) for layer in found] == [i in expected for i in range(layers)]
        assert all(layer.cell("task", "default") is not None for layer in found)
    model = get_peft_model(tiny("bert"), MixdaConfig(target_modules=r".*layer\.1\.output\.dense"))
    assert list(adapted_paths(model)) == ["bert.encoder.layer.1.output.dense"]


def test_layers_that_are_not_there_are_refused():
    base = tiny("llama")
    with pytest.raises(ValueError, match=r"match nothing in layers \[5\]"):
        get_peft_model(base, MixdaConfig(domain_layers=[0, 5]))
    with pytest.raises(ValueError, match="`target_modules` must name linear maps"):
        get_peft_model(base, MixdaConfig(target_modules=["input_layernorm"]))


def test_the_adapted_layer_is_the_formula():
    for family in ("bert", "gpt2"):  # a Linear and a Conv1D
        base = tiny(family)
        model = perturb(get_peft_model(base, MixdaConfig(domains=["a", "b"], domain_layers=[1], task_reduction=4)))
        layer = next(m for m in adapted_paths(model).values() if m.cell("gate", "default") is not None)
        x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
        experts, gate = layer.cell("expert", "default"), layer.cell("gate", "default")
        w = (x @ gate.out.weight.T + gate.out.bias).softmax(-1)
        output = w[..., 2:] * layer.base_layer(x)
        for j, name in enumerate(("a", "b")):
            inside = torch.nn.functional.gelu(x @ experts[name].down.weight.T + experts[name].down.bias)
            output = output + w[..., j : j + 1] * (inside @ experts[name].up.weight.T + experts[name].up.bias)
        task = layer.cell("task", "default")
        inside = torch.nn.functional.silu(task.down(output))
        torch.testing.assert_close(layer(x), output + task.up(inside))


@pytest.mark.parametrize("pooling", ["token", "mean", "last"])
def test_padding_changes_nothing_but_for_a_gate_that_reads_the_last_position(pooling):
    model = get_peft_model(tiny("bert"), MixdaConfig(domain_layers=[0, 1], gate_pooling=pooling, init_weights=False))
    model.eval()
    with torch.no_grad():
        short = model(input_ids=IDS[1:, :3], attention_mask=MASK[1:, :3]).logits
        padded = model(input_ids=IDS[1:], attention_mask=MASK[1:]).logits[:, :3]
    equal = torch.allclose(short, padded, atol=1e-6)
    assert equal == (pooling != "last")


def test_one_decision_per_text_or_per_position():
    from hf_moe.adapters.mixda import record_gates

    for pooling, positions in (("token", 6), ("mean", 1), ("last", 1)):
        config = MixdaConfig(domains=["a", "b"], domain_layers=[1], gate_pooling=pooling)
        model = get_peft_model(tiny("bert"), config).eval()
        with record_gates(model) as recorder, torch.no_grad():
            model(input_ids=IDS, attention_mask=MASK)
        (weights,) = recorder.weights["bert.encoder.layer.1.output.dense"]
        assert weights.shape == (2, positions, 3)  # neither batch nor position is dropped
        assert recorder.shares(MASK)["bert.encoder.layer.1.output.dense"].keys() == {"a", "b", ""}
        with record_gates(model) as recorder, torch.no_grad():
            model(input_ids=IDS[:1, :1])
        assert recorder.weights["bert.encoder.layer.1.output.dense"][0].shape == (1, 1, 3)
    with pytest.raises(ValueError, match="no gates"), record_gates(tiny("bert")):
        pass


def test_a_mean_over_later_positions_is_refused_where_text_is_generated():
    for family in ("llama", "gpt2", "t5"):
        base = tiny(family)
        kinds = [type(module) for module in base.modules()]
        with pytest.raises(ValueError, match="`gate_pooling='mean'` cannot be used"):
            get_peft_model(base, MixdaConfig(gate_pooling="mean"))
        assert [type(module) for module in base.modules()] == kinds
    encoder = MixdaConfig(gate_pooling="mean", target_modules=r"encoder\..*\.wo", init_weights=False)
    model = get_peft_model(tiny("t5"), encoder).eval()
    settings = {"attention_mask": MASK, "max_new_tokens": 4, "do_sample": False}
    cached = model.generate(input_ids=IDS, **settings)
    assert torch.equal(cached, model.generate(input_ids=IDS, use_cache=False, **settings))


def test_a_mean_needs_positions_and_a_mask_of_their_shape():
    model = get_peft_model(tiny("bert"), MixdaConfig(gate_pooling="mean", domain_layers=[0])).eval()
    with pytest.raises(ValueError, match="needs a `attention_mask` of the shape \\(2, 6\\)"):
        model(input_ids=IDS, attention_mask=torch.ones(2, 1, 6, 6))
    model = get_peft_model(tiny("opt"), MixdaConfig(gate_pooling="last", domain_layers=[0])).eval()
    with pytest.raises(ValueError, match="batch and sequence"):  # OPT hands all positions on as rows
        model(input_ids=IDS)


_SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_SIZES |= {"num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize(
    "kind, path, fields",
    [
        ("electra", "encoder.layer.{}.output.dense", {"embedding_size": 32}),
        ("deberta-v2", "encoder.layer.{}.output.dense", {}),
        ("distilbert", "transformer.layer.{}.ffn.lin2", {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}),
        ("modernbert", "layers.{}.mlp.Wo", {"cls_token_id": 1, "sep_token_id": 2}),
        ("vit", "layers.{}.mlp.fc2", {"image_size": 16, "patch_size": 8}),
        ("gpt_neox", "layers.{}.mlp.dense_4h_to_h", {}),
        ("phi", "layers.{}.mlp.fc2", {}),
        ("qwen3", "layers.{}.mlp.down_proj", {"head_dim": 8}),
        ("gemma", "layers.{}.mlp.down_proj", {"head_dim": 8}),
    ],
)
def test_other_architectures_have_their_names(kind, path, fields):
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        base = AutoModel.from_config(AutoConfig.for_model(kind, **(_SIZES | fields)))
    model = get_peft_model(base, MixdaConfig(domain_layers=[0, 1]))
    found = adapted_paths(model)
    assert set(found) == {path.format(layer) for layer in (0, 1)}
    assert {(layer.in_features, layer.out_features) for layer in found.values()} == {(48, 32)}
