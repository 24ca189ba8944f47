import pytest
import torch
from common.upcycling_toys import D, I, tiny_dense, tokens, toy_ffn
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from hf_moe.upcycling import extract_feed_forward, locate_feed_forwards
from hf_moe.upcycling.feed_forward import find_feed_forwards


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gpt_neox", "phi", "granite"])
def test_extracted_matrices_compute_what_the_module_does(kind):
    model = tiny_dense(kind)
    site = locate_feed_forwards(model)[1]
    x = tokens(hidden=16)
    expected = site.module.eval()(x[None])[0]
    torch.testing.assert_close(extract_feed_forward(site.module)(x), expected, rtol=0, atol=2e-6)


def test_conv1d_is_read_transposed():
    model = tiny_dense("gpt2")
    module = model.transformer.h[0].mlp
    ffn = extract_feed_forward(module)
    assert isinstance(module.c_fc, Conv1D)
    assert ffn.up.shape == (32, 16) and ffn.down.shape == (16, 32)
    assert torch.equal(ffn.up, module.c_fc.weight.T) and torch.equal(ffn.up_bias, module.c_fc.bias)
    assert not ffn.gated and ffn.biased and ffn.activation == "gelu_new"


def test_extraction_copies_nothing():
    module = tiny_dense("llama").model.layers[0].mlp
    ffn = extract_feed_forward(module)
    assert ffn.gate.data_ptr() == module.gate_proj.weight.data_ptr()
    assert not ffn.gate.requires_grad


def test_a_module_that_computes_something_else_is_refused_by_class_name():
    class ScaledMLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj, self.down_proj = nn.Linear(D, I), nn.Linear(I, D)
            self.act_fn = ACT2FN["relu"]

        def forward(self, x):
            return 3 * self.down_proj(self.act_fn(self.up_proj(x)))

    with pytest.raises(ValueError, match=r"ScaledMLP has the layers of a plain feed-forward but computes something"):
        extract_feed_forward(ScaledMLP())


def test_a_module_of_another_form_is_refused_by_class_name():
    with pytest.raises(ValueError, match=r"LlamaAttention is not a plain feed-forward"):
        extract_feed_forward(tiny_dense("llama").model.layers[0].self_attn)


def test_a_feed_forward_with_further_weights_is_not_plain():
    class NormedMLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj, self.down_proj, self.norm = nn.Linear(D, I), nn.Linear(I, D), nn.LayerNorm(D)

    with pytest.raises(ValueError, match=r"NormedMLP is not a plain feed-forward"):
        extract_feed_forward(NormedMLP())


def test_an_unknown_activation_is_asked_for():
    class OddMLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj, self.down_proj = nn.Linear(D, I), nn.Linear(I, D)

    with pytest.raises(ValueError, match=r"cannot tell the activation function of OddMLP; pass `activation`"):
        extract_feed_forward(OddMLP())
    assert extract_feed_forward(OddMLP(), activation="relu", verify=False).activation == "relu"


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_shards_sum_to_the_whole(gated, biased):
    ffn, x = toy_ffn(gated=gated, biased=biased), tokens()
    parts = [ffn.channels(range(0, 10)), ffn.channels([23, *range(10, 23)])]
    total = sum(part.with_down_bias_share(0.5)(x) for part in parts)
    torch.testing.assert_close(total, ffn(x), rtol=0, atol=2e-6)


def test_scaling_is_folded_in_float32():
    ffn = toy_ffn(biased=True).map(lambda t: t.bfloat16())
    assert torch.equal(ffn.scaled(2.5).down, (ffn.down.float() * 2.5).bfloat16())
    assert torch.equal(ffn.scaled(2.5).down_bias, (ffn.down_bias.float() * 2.5).bfloat16())
    assert ffn.scaled(1).down is ffn.down
    assert ffn.scaled(2.5).up is ffn.up


def test_silenced_gives_zero_and_keeps_the_rest():
    ffn = toy_ffn(biased=True)
    assert torch.equal(ffn.silenced()(tokens()), torch.zeros(12, D))
    assert ffn.silenced().gate is ffn.gate


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", [0, 1, 2, 3]),
        ("every:2", [1, 3]),
        ("every:3", [2]),
        ("first_half", [0, 1]),
        ("second_half", [2, 3]),
        ([3, 0], [0, 3]),
        (r"layers\.[12]\.mlp", [1, 2]),
    ],
)
def test_layers_are_selected(layers, expected):
    model = tiny_dense("llama", num_hidden_layers=4)
    sites = locate_feed_forwards(model, layers)
    assert [site.layer_idx for site in sites] == expected
    assert [site.name for site in sites] == [f"model.layers.{i}.mlp" for i in expected]
    assert all(site.layer_name == site.name.removesuffix(".mlp") for site in sites)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([7], r"`layers` has \[7\], but the model has 2 layers: use indices from 0 to 1"),
        ([-1], r"`layers` has \[-1\], but the model has 2 layers"),
        ([0, 0], "`layers` names a layer twice"),
        ([], "selects none of the 2 layers"),
        ("every:0", "must be 'every:<m>' with a whole number m of at least 1"),
        ("every:x", "must be 'every:<m>'"),
        ("every:3", "selects none of the 2 layers"),
        ("decoder", "matches no feed-forward of LlamaForCausalLM.*model.layers.0.mlp"),
        ("(", "nor a regular expression"),
    ],
)
def test_wrong_layers_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        locate_feed_forwards(tiny_dense("llama"), layers)


def test_layers_must_be_integers():
    with pytest.raises(TypeError, match=r"must be a list of integers, got '0'"):
        locate_feed_forwards(tiny_dense("llama"), ["0"])


def test_a_model_without_plain_feed_forwards_is_named():
    from transformers import MambaConfig, MambaModel

    config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32)
    with pytest.raises(ValueError, match=r"MambaModel cannot be upcycled: no layer has a plain feed-forward"):
        locate_feed_forwards(MambaModel(config))


def test_a_mixture_of_experts_is_not_upcycled_again():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=1,
        shared_expert_intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, num_experts=2,
        num_experts_per_tok=1,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config)
    assert find_feed_forwards(model) == []  # its shared expert has the layers of one
    with pytest.raises(ValueError, match=r"it is already a Mixture-of-Experts"):
        locate_feed_forwards(model)


def test_several_stacks_need_a_pattern():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.text, self.vision = tiny_dense("llama").model, tiny_dense("qwen2").model

    with pytest.raises(ValueError, match=r"several stacks of layers \(text.layers, vision.layers\)"):
        locate_feed_forwards(Two(), "all")
    assert len(locate_feed_forwards(Two(), r"^text\.")) == 2
