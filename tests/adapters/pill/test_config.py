"""What a PILL config accepts, and what it says otherwise."""

import pytest

from hf_moe.adapters.pill import PillConfig


def test_defaults_are_the_papers():
    config = PillConfig()
    assert (config.r, config.modalities, config.stage) == (32, ["text", "image"], "instruct")
    assert config.attention_gate and config.adapt_attention and config.modality_experts
    assert not config.last_layer_invert and config.gated == [1]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"r": 0}, ValueError, "`r` must be"),
        ({"stage": "both"}, ValueError, "`stage` must be 'align' or 'instruct', got 'both'"),
        ({"modalities": ["text"]}, ValueError, "`modalities` must be two or more"),
        ({"modalities": ["text", "text"]}, ValueError, "`modalities`"),
        ({"modalities": ["text", "a.b"]}, ValueError, "`modalities`"),
        ({"modalities": ["text", "shared"]}, ValueError, "`modalities`"),
        ({"modality_token_ids": {"audio": 3}}, ValueError, "'audio'.*Add it to `modalities`"),
        ({"modality_token_ids": {"text": 3}}, ValueError, "those with tokens of their own are \\['image'\\]"),
        ({"modality_token_ids": {"image": -1}}, TypeError, "token ids"),
        ({"modality_token_ids": {"image": True}}, TypeError, "token ids"),
        ({"modality_token_ids": {"image": [3, 3]}}, ValueError, "twice"),
        ({"modality_token_ids": 3}, TypeError, "must map"),
        ({"gate_modalities": ["text"]}, ValueError, "must be some of \\['image'\\]"),
        ({"gate_modalities": ["audio"]}, ValueError, "`gate_modalities`"),
        ({"last_layer_invert": True, "modalities": ["text", "image", "audio"]}, ValueError, "two `modalities`"),
        ({"last_layer_invert": True, "modality_experts": False}, ValueError, "`modality_experts=True`"),
    ],
)
def test_errors_name_the_field_and_what_is_allowed(fields, error, message):
    with pytest.raises(error, match=message):
        PillConfig(**fields)


def test_token_ids_may_be_one_number_or_several():
    config = PillConfig(modalities=["text", "image", "audio"], modality_token_ids={"image": 7, "audio": (8, 9)})
    assert config.modality_token_ids == {"image": [7], "audio": [8, 9]}


def test_gated_modalities():
    names = ["text", "image", "audio"]
    assert PillConfig(modalities=names).gated == [1, 2]
    assert PillConfig(modalities=names, gate_modalities=["audio"]).gated == [2]
    assert PillConfig(modalities=names, attention_gate=False).gated == []


def test_aligning_trains_only_the_other_modalities_adapters():
    assert PillConfig(stage="align").frozen_containers() == ("attn", "text", "gate")
    assert PillConfig().frozen_containers() == ()
