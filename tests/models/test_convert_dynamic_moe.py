"""A random checkpoint in the released Dynamic_MoE layout, its routing written down again, and the converter."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_moe import cli
from hf_moe.models.dynamic_moe.convert_released import convert_released, released_config


RELEASED = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_experts": 4,
    "top_p_threshold": 0.6,
    "rope_theta": 500000.0,  # the released code never reads it
    "num_key_value_heads": 2,  # nor this
}


def is_moe(released, layer):
    return layer % released.get("expert_frequency", 2) == 0


def random_weights(released):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    d, i = released["hidden_size"], released["intermediate_size"]
    weights = {
        "model.embed_tokens.weight": draw(released["vocab_size"], d, scale=4.0),
        "model.norm.weight": 1 + draw(d),
        "lm_head.weight": draw(released["vocab_size"], d),
    }
    for layer in range(released["num_hidden_layers"]):
        own = f"model.layers.{layer}"
        weights[f"{own}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        for name in "qkvo":
            weights[f"{own}.self_attn.{name}_proj.weight"] = draw(d, d)
        for name in ("input_norm", "post_attention_norm"):
            weights[f"{own}.{name}.weight"] = 1 + draw(d)
        feed_forwards = [f"{own}.mlp.mlp"]
        if is_moe(released, layer):
            weights[f"{own}.mlp.router.weight"] = draw(released["num_experts"], d, scale=1.5)
            feed_forwards = [f"{own}.mlp.experts.{e}" for e in range(released["num_experts"])]
        for module in feed_forwards:
            weights[f"{module}.gate_proj.weight"] = draw(i, d)
            weights[f"{module}.up_proj.weight"] = draw(i, d)
            weights[f"{module}.down_proj.weight"] = draw(d, i)
    return weights


class ReferenceBlock(torch.nn.Module):
    """The released feed-forward, in our words."""

    def __init__(self, released, weights, layer):
        super().__init__()
        self.p, self.counts = released["top_p_threshold"], []
        prefix = f"model.layers.{layer}.mlp."
        self.w = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}

    def forward(self, hidden_states):
        rows = []
        for x in hidden_states.flatten(0, 1):
            total, output = 0.0, torch.zeros_like(x)
            probabilities = (self.w["router.weight"] @ x).softmax(0)
            used = 0
            for e in probabilities.argsort(descending=True).tolist():
                used += 1
                gated = F.silu(self.w[f"experts.{e}.gate_proj.weight"] @ x)
                inner = gated * (self.w[f"experts.{e}.up_proj.weight"] @ x)
                output = output + probabilities[e] * (self.w[f"experts.{e}.down_proj.weight"] @ inner)
                total += probabilities[e].item()
                if total > self.p:
                    break
            self.counts.append(used)
            rows.append(output)
        return torch.stack(rows).view_as(hidden_states)


def reference_model(released, weights):
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    model = LlamaForCausalLM(LlamaConfig(**{name: released[name] for name in same}, rms_norm_eps=1e-6)).eval()
    blocks = {}
    plain = {}
    for name, value in weights.items():
        for old, new in (("input_norm", "input_layernorm"), ("post_attention_norm", "post_attention_layernorm")):
            name = name.replace(f".{old}.", f".{new}.")
        plain[name.replace(".mlp.mlp.", ".mlp.")] = value
    model.load_state_dict(plain, strict=False)
    for layer in range(released["num_hidden_layers"]):
        if is_moe(released, layer):
            blocks[layer] = model.model.layers[layer].mlp = ReferenceBlock(released, weights, layer)
    return model, blocks


def write(folder, released, weights):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(released))
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("changes", [{}, {"top_p_threshold": 0.8}, {"expert_frequency": 1}], ids=str)
def test_a_converted_checkpoint_gives_the_outputs_of_the_released_code(changes, tmp_path):
    released = {**RELEASED, **changes}
    weights = random_weights(released)
    convert_released(write(tmp_path / "released", released, weights), tmp_path / "ours")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    theirs, blocks = reference_model(released, weights)
    input_ids = torch.arange(24).view(2, 12) % 64
    with torch.no_grad():
        outputs, expected = ours(input_ids, output_router_logits=True), theirs(input_ids).logits
    torch.testing.assert_close(outputs.logits, expected, rtol=1e-4, atol=1e-4)
    used = [(index < 4).sum(-1).tolist() for index in outputs.router_indices]
    assert used == [block.counts for block in blocks.values()]
    assert len({count for layer in used for count in layer}) > 1  # tokens differ


def test_nothing_is_rounded(tmp_path):
    weights = {name: value.to(torch.bfloat16) for name, value in random_weights(RELEASED).items()}
    convert_released(write(tmp_path / "released", RELEASED, weights), tmp_path / "ours", max_shard_bytes=20_000)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto").state_dict()
    stacked = ours["model.layers.2.mlp.experts.gate_up_proj"]
    own = "model.layers.2.mlp.experts.3"
    expected = torch.cat([weights[f"{own}.gate_proj.weight"], weights[f"{own}.up_proj.weight"]])
    assert stacked.dtype == torch.bfloat16 and torch.equal(stacked[3], expected)
    assert torch.equal(ours["model.layers.1.mlp.up_proj.weight"], weights["model.layers.1.mlp.mlp.up_proj.weight"])


def test_the_config_is_translated():
    config = released_config({**RELEASED, "top_p_threshold": 0.5})
    assert config.moe_layer_indices == [0, 2] and config.router_config == {"p": 0.5}
    assert config.num_key_value_heads == 4 and config.rope_parameters["rope_theta"] == 10000.0
    full = released_config({"num_experts": 16})
    assert (full.hidden_size, full.num_hidden_layers, full.max_position_embeddings) == (4096, 32, 2048)
    assert full.router_config == {"p": 0.4} and full.moe_layer_indices == list(range(0, 32, 2))


@pytest.mark.parametrize(
    ("released", "message"),
    [
        ({**RELEASED, "num_experts": -1}, "`num_experts` of a released Dynamic_MoE config .* got -1"),
        ({"model_type": "llama"}, "`num_experts` of a released Dynamic_MoE config .* got None"),
        ([], "`num_experts` of a released Dynamic_MoE config .* got None"),
        ({**RELEASED, "expert_frequency": 0}, "`expert_frequency` must be a whole number above 0, got 0"),
        ({**RELEASED, "top_p_threshold": 0}, r"`router_config\['p'\]` must be above 0"),
    ],
    ids=str,
)
def test_other_configs_are_refused(released, message):
    with pytest.raises(ValueError, match=message):
        released_config(released)


def test_files_of_another_model_are_refused(tmp_path):
    weights = random_weights(RELEASED)
    folder = write(tmp_path / "more", {**RELEASED, "num_experts": 8}, weights)
    with pytest.raises(ValueError, match=r"lacks \d+ tensors .*experts\.4\."):
        convert_released(folder, tmp_path / "ours")
    folder = write(tmp_path / "fewer", {**RELEASED, "num_experts": 2}, weights)
    with pytest.raises(
        ValueError, match=r"has \d+ tensors .*\(`num_experts`, `num_hidden_layers`, `expert_frequency`\)"
    ):
        convert_released(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_the_command_converts(tmp_path, capsys):
    source = write(tmp_path / "released", RELEASED, random_weights(RELEASED))
    assert cli.main(["convert", "dynamic-moe", str(source), str(tmp_path / "ours")]) == 0
    assert "AutoModelForCausalLM" in capsys.readouterr().out
