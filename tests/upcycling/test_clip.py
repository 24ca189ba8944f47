"""Dense CLIPs become one CLIP-MoE and come back; positions for longer captions."""

import pytest
import torch
from common.tiny_clip import clip_inputs, make_clip

from hf_moe import upcycle_clip
from hf_moe.upcycling import extract_clip, stretch_positions, stretch_text_positions


def stages(count):
    """The base and models that differ from it in feed-forwards alone."""
    base, found = make_clip(), [make_clip()]
    for seed in range(1, count):
        model = make_clip()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".mlp." in name:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        found.append(model)
    return base, found


@pytest.mark.parametrize("router_std", [0.0, 5.0])
def test_copies_give_the_dense_features_whatever_the_router(router_std):
    base, inputs = make_clip(), clip_inputs(padded=True)
    moe = upcycle_clip(base, num_experts=4, router_std=router_std)
    with torch.no_grad():
        ours, theirs = moe(**inputs), base(**inputs)
    torch.testing.assert_close(ours.image_embeds, theirs.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.text_embeds, theirs.text_embeds, rtol=0, atol=1e-5)


def test_expert_i_is_the_feed_forward_of_model_i():
    base, models = stages(3)
    moe = upcycle_clip(base, models)
    for i, model in enumerate(models):
        bank = moe.vision_model.encoder.layers[1].mlp.experts
        dense = model.vision_model.encoder.layers[1].mlp
        assert torch.equal(bank.up_proj[i], dense.fc1.weight) and torch.equal(bank.down_proj_bias[i], dense.fc2.bias)
    assert moe.config.vision_config.num_experts == 3
    assert torch.equal(
        moe.text_model.encoder.layers[0].self_attn.q_proj.weight,
        base.text_model.encoder.layers[0].self_attn.q_proj.weight,
    )


def test_going_back_is_exact():
    base, models = stages(3)
    moe = upcycle_clip(base, models, text_layers=[1])
    back = extract_clip(moe)
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in base.state_dict().items())
    third = extract_clip(moe, 2)
    assert torch.equal(
        third.vision_model.encoder.layers[0].mlp.fc1.weight, models[2].vision_model.encoder.layers[0].mlp.fc1.weight
    )
    with pytest.raises(ValueError, match="`expert` must be from 0 to 2, got 3"):
        extract_clip(moe, 3)


def test_what_else_differs_is_said(caplog):
    base, models = stages(2)
    with torch.no_grad():
        models[1].visual_projection.weight.add_(1)
    with caplog.at_level("WARNING"):
        upcycle_clip(base, models)
    assert (
        "differs from `base` in more than feed-forwards (1 tensors, such as 'visual_projection.weight')" in caplog.text
    )


def test_models_that_do_not_fit_are_refused():
    base = make_clip()
    with pytest.raises(ValueError, match=r"`experts\[1\]` has another size than `base`"):
        upcycle_clip(base, [base, make_clip(intermediate_size=64)])
    with pytest.raises(ValueError, match="`num_experts=3`, but there are 1 models"):
        upcycle_clip(base, [base], num_experts=3)
    with pytest.raises(TypeError, match="must be CLIPModel"):
        upcycle_clip(base.text_model)
    with pytest.raises(ValueError, match="`num_experts_per_tok` must be between 1 and the number of experts"):
        upcycle_clip(base, num_experts=1)


def test_positions_are_stretched_as_long_clip_does():
    table = torch.arange(77.0)[:, None]
    new = stretch_positions(table)[:, 0]
    assert len(new) == 248
    assert new[:20].tolist() == list(range(20))
    assert new[18:26].tolist() == [18, 19, 20, 20.25, 20.5, 20.75, 21, 21.25]
    assert new[242:].tolist() == [75.5, 75.75, 76, 76.25, 76.5, 76.75]
    with pytest.raises(ValueError, match="`keep` must be from 0 to 75, got 76"):
        stretch_positions(table, keep=76)
    with pytest.raises(ValueError, match="`factor` must be at least 1, got 0"):
        stretch_positions(table, factor=0)


@pytest.mark.parametrize("sparse", [False, True])
def test_short_captions_keep_their_features(sparse, tmp_path):
    model = make_clip()
    model = upcycle_clip(model) if sparse else model
    longer = stretch_text_positions(model, keep=10)
    assert (
        longer.config.text_config.max_position_embeddings
        == 10 + 4 * 14
        != model.config.text_config.max_position_embeddings
    )
    short, long = clip_inputs(length=10), clip_inputs(length=50)
    with torch.no_grad():
        assert torch.equal(longer(**short).text_embeds, model(**short).text_embeds)
        expected = longer(**long).text_embeds
    longer.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(type(longer).from_pretrained(tmp_path)(**long).text_embeds, expected)
