"""A random checkpoint in the released MoE++ layout, the released routing written down again, and the converter."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_moe import cli
from hf_moe.models.moe_plus_plus.convert_released import convert_released, released_config


FFN, TOTAL = 4, 8
RELEASED = {
    "architectures": ["MoeForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_moe_plus_plus.MoeConfig"},
    "model_type": "MoE++",
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.01,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "num_experts": [TOTAL],
    "moe_use_mixtral_gating": False,
    "moe_2layer_gate": False,
    "moe_use_logits_norm": True,
    "moe_gate_norm_std": 1.0,
    "moe_feature_no_mul_topk": True,
    "moe_expert_interval": 1,
    "sliding_window": None,
    "rotary_percent": 1.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "rope_theta": 10000,
}
# The settings of the released 7B, then each other path of the released code.
VARIANTS = {
    "released_7b": {},
    "code_defaults": {"moe_2layer_gate": True, "moe_use_logits_norm": False, "moe_feature_no_mul_topk": False},
    "mixtral_gating": {"moe_use_mixtral_gating": True, "moe_gate_norm_std": 0.5},
    "wide_norm_scaled_input": {"moe_gate_norm_std": 3.0, "moe_feature_no_mul_topk": False},
    "every_other_layer": {"moe_expert_interval": 2},
    "tied_linear_rope": {"tie_word_embeddings": True, "rope_scaling": {"type": "linear", "factor": 2.0}},
}


def is_moe(released, layer):
    return (layer + 1) % released["moe_expert_interval"] == 0


def random_weights(released, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    d, i = released["hidden_size"], released["intermediate_size"]
    weights = {"model.embed_tokens.weight": draw(released["vocab_size"], d, scale=4.0)}
    weights["model.norm.weight"] = 1 + draw(d)
    if not released["tie_word_embeddings"]:
        weights["lm_head.weight"] = draw(released["vocab_size"], d)
    first = True
    for layer in range(released["num_hidden_layers"]):
        own = f"model.layers.{layer}"
        for name in "qkvo":
            weights[f"{own}.self_attn.{name}_proj.weight"] = draw(d, d)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{own}.{name}.weight"] = 1 + draw(d)
        if not is_moe(released, layer):
            weights[f"{own}.mlp.gate_proj.weight"] = draw(i, d)
            weights[f"{own}.mlp.up_proj.weight"] = draw(i, d)
            weights[f"{own}.mlp.down_proj.weight"] = draw(d, i)
            continue
        gate, experts = f"{own}.mlp.moe.gate", f"{own}.mlp.moe.experts.experts"
        if released["moe_2layer_gate"]:
            weights[f"{gate}.wg.0.weight"] = draw(8 * TOTAL, d)
            weights[f"{gate}.wg.2.weight"] = draw(TOTAL, 8 * TOTAL, scale=3.0)
        else:
            weights[f"{gate}.wg.weight"] = draw(TOTAL, d)
        if not first:  # the first MoE layer of the released files has none
            weights[f"{gate}.gate_map.weight"] = draw(TOTAL, TOTAL)
        first = False
        for e in range(FFN):
            weights[f"{experts}.{e}.up_proj.weight"] = draw(2 * i, d)
            weights[f"{experts}.{e}.down_proj.weight"] = draw(d, i)
        for e in range(FFN, FFN + 2):
            weights[f"{experts}.{e}.constant"] = draw(d, scale=6.0)
            weights[f"{experts}.{e}.wg.weight"] = draw(2, d)
    return weights


class ReferenceBlock(torch.nn.Module):
    """The released feed-forward, in our words. `shared` carries the residual logits from block to block."""

    def __init__(self, released, weights, layer, shared):
        super().__init__()
        self.released, self.shared = released, shared
        self.w = {k.split(".mlp.moe.")[1]: v for k, v in weights.items() if k.startswith(f"model.layers.{layer}.mlp.")}

    def expert(self, e, x):
        if e < FFN:
            gated, up = (self.w[f"experts.experts.{e}.up_proj.weight"] @ x).chunk(2)
            return self.w[f"experts.experts.{e}.down_proj.weight"] @ (F.silu(gated) * up)
        if e < FFN + 2:
            a = (self.w[f"experts.experts.{e}.wg.weight"] @ x).softmax(0)
            return a[0] * x + a[1] * self.w[f"experts.experts.{e}.constant"]
        return x if e == FFN + 2 else torch.zeros_like(x)

    def forward(self, hidden_states):
        x = hidden_states.flatten(0, 1)
        if self.released["moe_2layer_gate"]:
            logits = torch.tanh(x @ self.w["gate.wg.0.weight"].T) @ self.w["gate.wg.2.weight"].T
        else:
            logits = x @ self.w["gate.wg.weight"].T
        if self.shared["logits"] is not None:
            logits = logits + self.shared["logits"] @ self.w["gate.gate_map.weight"].T
        self.shared["logits"] = logits
        if self.released["moe_use_logits_norm"]:
            logits = logits / (logits.std(1, keepdim=True) / self.released["moe_gate_norm_std"])
        scaled = not (self.released["moe_use_mixtral_gating"] or self.released["moe_feature_no_mul_topk"])
        rows = []
        for token, score in zip(x * 2 if scaled else x, logits, strict=True):
            (first, second), chosen = score.topk(2)
            if self.released["moe_use_mixtral_gating"]:
                weights = torch.stack([first, second]).softmax(0)
            else:
                weights = score.softmax(0)[chosen].masked_fill(chosen == TOTAL - 1, 0.0)
                weights = weights / weights.sum()
            self.shared["chosen"].update(chosen.tolist())
            rows.append(sum(w * self.expert(e, token) for w, e in zip(weights, chosen.tolist(), strict=True)))
        return torch.stack(rows).view_as(hidden_states)


def reference_logits(released, weights, input_ids):
    """transformers' Llama with the feed-forwards replaced; attention and norms of the released code are Llama's."""
    same = {k: v for k, v in released.items() if k in LlamaConfig.__dataclass_fields__}
    same.pop("architectures"), same.pop("initializer_range"), same.pop("torch_dtype", None)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if released.get("rope_scaling"):
        rope.update(rope_type="linear", factor=released["rope_scaling"]["factor"])
    model = LlamaForCausalLM(LlamaConfig(**{**same, "rope_parameters": rope})).eval()
    dense = {k: v for k, v in weights.items() if ".moe." not in k}
    model.load_state_dict(dense, strict=False)
    shared = {"logits": None, "chosen": set()}
    for layer, module in enumerate(model.model.layers):
        if is_moe(released, layer):
            module.mlp = ReferenceBlock(released, weights, layer, shared)
    logits = model(input_ids).logits
    assert shared["chosen"] == set(range(TOTAL))  # every expert took part
    return logits


def write(folder, released, weights, form="safetensors"):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(released))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    names = sorted(weights)
    if form == "safetensors":
        save_file({name: weights[name] for name in names}, folder / "model.safetensors")
    elif form == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:  # shards that cut through the experts of a layer
        files = {}
        for part in range(3):
            file = f"pytorch_model-{part + 1:05d}-of-00003.bin"
            torch.save({name: weights[name] for name in names[part::3]}, folder / file)
            files.update({name: file for name in names[part::3]})
        index = {"metadata": {}, "weight_map": files}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def input_ids(generator):
    return torch.randint(1, 64, (2, 20), generator=generator)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_converted_model_gives_the_released_codes_logits(variant, implementation, input_ids, tmp_path):
    released = {**RELEASED, **VARIANTS[variant]}
    weights = random_weights(released)
    folder = convert_released(write(tmp_path / "released", released, weights), tmp_path / "converted")
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation=implementation, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        ours, expected = model(input_ids).logits, reference_logits(released, weights, input_ids)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded_bin"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_every_file_format_and_shard_size_gives_the_same_model(form, max_shard_bytes, tmp_path):
    weights = random_weights(RELEASED, torch.bfloat16)
    source = write(tmp_path / "released", RELEASED, weights, form)
    folder = convert_released(source, tmp_path / "converted", max_shard_bytes=max_shard_bytes)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (max_shard_bytes < 10**9)
    assert (folder / "generation_config.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    block = model.model.layers[1].mlp
    experts = "model.layers.1.mlp.moe.experts.experts"
    assert torch.equal(block.experts.gate_up_proj[3], weights[f"{experts}.3.up_proj.weight"])
    assert torch.equal(block.zero_experts.constants[1], weights[f"{experts}.5.constant"])
    gate_map = weights["model.layers.1.mlp.moe.gate.gate_map.weight"]
    assert block.gate.residual_weight.dtype == torch.float32
    assert torch.equal(block.gate.residual_weight, gate_map.float())


def test_a_residual_map_of_the_first_layer_and_rotary_buffers_are_left_out(tmp_path):
    weights = random_weights(RELEASED)
    weights["model.layers.0.mlp.moe.gate.gate_map.weight"] = torch.ones(TOTAL, TOTAL)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    convert_released(write(tmp_path / "released", RELEASED, weights), tmp_path / "converted")


def test_config_of_the_released_7b():
    # The fields of the published config.json.
    config = released_config(
        {
            **RELEASED,
            "vocab_size": 65536,
            "hidden_size": 1536,
            "intermediate_size": 4096,
            "max_position_embeddings": 2048,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_hidden_layers": 24,
            "num_experts": [20],
        }
    )
    assert (config.num_experts, config.num_zero_computation_experts, config.num_experts_per_tok) == (16, 4, 2)
    assert config.router_type == "moepp_release" and config.scale_expert_input is False
    assert config.router_config == {"num_layers_gate": 1, "mixtral_gating": False, "logit_norm_std": 1.0}
    assert config.rope_parameters["rope_theta"] == 10000.0 and config.head_dim == 96


def test_missing_fields_have_the_released_codes_defaults():
    config = released_config({"model_type": "MoE++", "num_experts": [32]})
    assert config.num_experts == 28 and config.scale_expert_input is True
    assert config.router_config == {"num_layers_gate": 2, "mixtral_gating": False, "logit_norm_std": None}


def test_ntk_scaling_multiplies_the_base():
    config = released_config({**RELEASED, "rope_scaling": {"type": "ntk", "factor": 8.0}})
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 80000.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": [4]}, r"`num_experts`.*got \[4\]"),
        ({"num_experts": [8, 8]}, r"`num_experts`.*got \[8, 8\]"),
        ({"hidden_act": "gelu"}, "`hidden_act='gelu'` is not supported"),
        ({"sliding_window": 128}, "`sliding_window=128` is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "`rope_scaling` of type 'yarn'"),
        ({"model_type": "llama"}, "`model_type` 'llama'"),
        ({"num_hidden_layers": 5}, r"lacks \d+ tensors .*model.layers.4"),
        ({"num_hidden_layers": 3}, r"has \d+ tensors the released layout does not have, first `model.layers.3"),
        ({"moe_2layer_gate": True}, r"lacks 8 tensors .*wg.0.weight"),
        ({"intermediate_size": 25}, r"shape \(4, 48, 32\), but `config.json` asks for \(4, 50, 32\)"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_left_behind(change, message, tmp_path):
    source = write(tmp_path / "released", {**RELEASED, **change}, random_weights(RELEASED))
    with pytest.raises(ValueError, match=message):
        convert_released(source, tmp_path / "converted")
    assert [path.name for path in tmp_path.iterdir()] == ["released"]


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded_bin"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "garbage"])
def test_damaged_files_are_named(form, damage, tmp_path):
    source = write(tmp_path / "released", RELEASED, random_weights(RELEASED), form)
    path = max(path for path in source.iterdir() if path.suffix in (".safetensors", ".bin"))
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {"truncated": path.read_bytes()[: path.stat().st_size // 2], "empty": b"", "garbage": b"x" * 99}[damage]
        )
    expected = "holds no weights" if damage == "missing" and form != "sharded_bin" else path.name
    with pytest.raises(ValueError, match=expected):
        convert_released(source, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_pickled_code_is_not_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    source = write(tmp_path / "released", RELEASED, random_weights(RELEASED), "bin")
    torch.save({"trap": Trap()}, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin.*cannot be read"):
        convert_released(source, tmp_path / "converted")
    assert not (tmp_path / "sprung").exists()


def test_an_existing_destination_is_not_touched(tmp_path):
    source = write(tmp_path / "released", RELEASED, random_weights(RELEASED))
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="exists already"):
        convert_released(source, tmp_path / "converted")
    assert [path.name for path in (tmp_path / "converted").iterdir()] == ["mine.txt"]


def test_an_interruption_leaves_nothing_behind(tmp_path, monkeypatch):
    from hf_moe.checkpoints import CheckpointWriter

    source = write(tmp_path / "released", RELEASED, random_weights(RELEASED))
    add = CheckpointWriter.add

    def interrupted(self, name, tensor):
        add(self, name, tensor)
        if name.startswith("model.layers.2"):
            raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointWriter, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_released(source, tmp_path / "converted", max_shard_bytes=10_000)
    assert [path.name for path in tmp_path.iterdir()] == ["released"]


def test_command_line(tmp_path, capsys):
    source = write(tmp_path / "released", RELEASED, random_weights(RELEASED))
    assert cli.main(["convert", "moepp", str(source), str(tmp_path / "converted")]) == 0
    assert "Wrote" in capsys.readouterr().out
    assert cli.main(["convert", "moepp", str(source), str(tmp_path / "converted")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["convert", "moe2", str(source), str(tmp_path / "other")]) == 2
    assert "`format` must be one of ['dynamic-moe', 'moe-llava', 'moepp'], got 'moe2'" in capsys.readouterr().err


def test_the_converted_folder_carries_the_shim_that_loads_it_elsewhere(tmp_path):
    source = write(tmp_path / "released", RELEASED, random_weights(RELEASED))
    folder = convert_released(source, tmp_path / "converted")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "moe_plus_plus" and config["architectures"] == ["MoePlusPlusForCausalLM"]
    assert config["auto_map"]["AutoModelForCausalLM"] == "hf_moe_shim.MoePlusPlusForCausalLM"
    assert (folder / "hf_moe_shim.py").is_file()
