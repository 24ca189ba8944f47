"""The local expert: identities of its mixture, its gate's inputs, its threshold. The battery has the rest."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from hf_moe.adapters.local_expert import LocalExpertConfig, mix
from hf_moe.adapters.local_expert.features import pool


IDS = torch.tensor([[5, 6, 7, 8], [9, 3, 2, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


class LeNet5(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.hidden = nn.Sequential(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU())
        self.classifier = nn.Linear(84, num_classes)

    def forward(self, x):
        return self.classifier(self.hidden(self.features(x).flatten(1)))


def lenet(num_classes=10):
    torch.manual_seed(0)
    return LeNet5(num_classes).eval()


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=3, **sizes)).eval()


def logits(model, **kwargs):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK, **kwargs).logits


def layer_of(model):
    return next(module for module in model.modules() if hasattr(module, "gate_logit"))


def added(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("classes", "size", "linear"), [(10, 61_706, 850), (26, 63_066, 2_210), (47, 64_851, 3_995), (62, 66_126, 5_270)]
)
def test_sizes_beside_lenet5(classes, size, linear):
    base = lenet(classes)
    assert sum(p.numel() for p in base.parameters()) == size
    model = get_peft_model(base, LocalExpertConfig(target_modules=["classifier"]))
    assert added(model) == linear + 85
    low_rank = get_peft_model(lenet(classes), LocalExpertConfig(target_modules=["classifier"], expert_rank=10))
    assert added(low_rank) == 10 * (84 + classes) + classes + 85


def test_a_hard_gate_gives_one_of_the_two_answers_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    z_global, z_local = torch.randn(2, 50, 7, generator=generator)
    gate = torch.rand(50, 1, generator=generator)
    answer = mix(z_global, z_local, gate, "hard", 0.3)
    local = (gate >= 0.3).squeeze(-1)
    assert 0 < local.sum() < 50
    assert torch.equal(answer[local], z_local[local]) and torch.equal(answer[~local], z_global[~local])
    assert torch.equal(mix(z_global, z_local, gate, "hard", 0.0), z_local)
    assert torch.equal(mix(z_global, z_local, gate, "hard", 1.5), z_global)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_mixing_equal_logits_is_the_identity(kind):
    z = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mix(z, z, torch.rand(5, 1, generator=torch.Generator().manual_seed(1)), kind, 0.5), z)


def test_mixing_probabilities():
    z_global, z_local = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 3.0]]).log().clamp_min(-100)
    mixture = mix(z_global, z_local, torch.tensor([[0.5]]), "prob", 0.5).exp()
    torch.testing.assert_close(mixture, torch.tensor([[0.25, 0.75]]))


@pytest.mark.parametrize("expert", ["residual", "linear"])
@pytest.mark.parametrize("mixing", ["hard", "soft"])
def test_a_fresh_one_answers_as_the_global_expert(expert, mixing):
    model = get_peft_model(bert(), LocalExpertConfig(expert=expert, mix=mixing)).eval()
    assert torch.equal(logits(model), logits(bert()))


def test_the_threshold_decides_who_answers_and_is_saved(tmp_path):
    model = get_peft_model(bert().bfloat16(), LocalExpertConfig(init_weights=False)).eval()
    model.base_model.set_threshold("default", 1.5)
    assert torch.equal(logits(model), logits(bert().bfloat16()))
    model.base_model.set_threshold("default", 0.0)
    assert not torch.equal(logits(model), logits(bert().bfloat16()))
    model.base_model.set_threshold("default", 0.7312345)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bert().bfloat16(), tmp_path).eval()
    # not rounded to bfloat16 on any way
    assert layer_of(again).cell("gate", "default").threshold.item() == pytest.approx(0.7312345, abs=1e-7)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match=r"`threshold` must be between 0 \(always\) and 2 \(never\), got 3"):
        model.base_model.set_threshold("default", 3)
    with pytest.raises(ValueError, match="`adapter_name` must be one of"):
        model.base_model.set_threshold("nobody", 0.5)


@pytest.mark.parametrize("expert", ["residual", "linear"])
def test_an_expert_that_always_answers_becomes_the_head(expert):
    model = get_peft_model(bert(), LocalExpertConfig(expert=expert, threshold=0.0, init_weights=False)).eval()
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), expected)
    assert isinstance(merged.classifier, nn.Linear)


def test_an_mlp_is_no_head():
    model = get_peft_model(bert(), LocalExpertConfig(expert="mlp", threshold=0.0))
    with pytest.raises(NotImplementedError, match="no linear head"):
        model.merge_and_unload()


def test_the_gate_can_read_an_early_layer_without_padding():
    name = "bert.encoder.layer.0"
    model = get_peft_model(bert(), LocalExpertConfig(gate_feature_module=name, init_weights=False)).eval()
    seen = {}
    layer = layer_of(model)
    handle = layer.cell("gate", "default").register_forward_pre_hook(lambda m, args: seen.update(q=args[0]))
    hidden = {}
    other = model.base_model.model.get_submodule(name).register_forward_hook(
        lambda m, args, out: hidden.update(h=out[0] if isinstance(out, tuple) else out)
    )
    logits(model)
    handle.remove(), other.remove()
    expected = torch.stack([hidden["h"][0].mean(0), hidden["h"][1, :3].mean(0)])
    torch.testing.assert_close(seen["q"], expected)


def test_the_gate_can_read_the_input():
    images = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    config = LocalExpertConfig(target_modules=["classifier"], gate_feature_module="input", gate_features=1024)
    model = get_peft_model(lenet(), config).eval()
    assert torch.equal(model(images), lenet()(images))
    with pytest.raises(ValueError, match="`gate_features` must be given"):
        get_peft_model(lenet(), LocalExpertConfig(target_modules=["classifier"], gate_feature_module="input"))
    model = get_peft_model(bert(), LocalExpertConfig(gate_feature_module="input", gate_features=4))
    with pytest.raises(ValueError, match="token ids"):
        logits(model)


def test_pictures_and_sequences_become_one_vector():
    f, picture = torch.zeros(2, 5), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pool(picture, f, "mean", None), picture.mean((2, 3)))
    torch.testing.assert_close(pool(picture, f, "first", None), picture[:, :, 0, 0])
    positions = torch.zeros(2, 4, 5)
    sequence = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    assert pool(sequence, positions, "mean", MASK) is sequence  # a head that answers at each position


def test_a_head_on_every_position_works():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForSequenceClassification(LlamaConfig(vocab_size=64, num_labels=3, pad_token_id=0, **sizes)).eval()
    expected = logits(base)
    model = get_peft_model(base, LocalExpertConfig(gate_feature_module="model.layers.0")).eval()
    assert torch.equal(logits(model), expected)


def test_while_training_the_stage_says_who_answers():
    model = get_peft_model(bert(), LocalExpertConfig(stage="expert", threshold=2.0, init_weights=False)).eval()
    assert torch.equal(logits(model), logits(bert()))  # evaluated as it would answer
    for dropout in model.modules():
        if isinstance(dropout, nn.Dropout):
            dropout.p = 0.0
    assert not torch.equal(logits(model.train()), logits(bert()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert": "big"}, "`expert` must be one of 'residual', 'linear', 'mlp', got 'big'"),
        ({"mix": "both"}, "`mix` must be one of"),
        ({"stage": "first"}, "`stage` must be one of"),
        ({"threshold": -0.1}, "`threshold` must be between 0"),
        ({"expert_rank": 0}, "`expert_rank` must be at least 1"),
        ({"expert": "linear", "expert_rank": 2}, "`expert_rank` is for"),
        ({"gate_hidden": 0}, "`gate_hidden` must be at least 1"),
        ({"task_type": "SEQ_CLS"}, "`task_type` must be left out"),
        ({"target_parameters": ["x"]}, "`target_parameters` must be left out"),
    ],
)
def test_bad_settings_are_refused_at_construction(fields, message):
    with pytest.raises(ValueError, match=message):
        LocalExpertConfig(**fields)


def test_bad_targets_leave_the_model_as_it_was():
    base = bert()
    with pytest.raises(ValueError, match="`gate_feature_module` must be the path"):
        get_peft_model(base, LocalExpertConfig(gate_feature_module="bert.nothing"))
    with pytest.raises(ValueError, match="heads that are Linear"):
        get_peft_model(base, LocalExpertConfig(target_modules=["pooler"]))
    assert torch.equal(logits(base), logits(bert()))
    assert [type(module) for module in base.modules()] == [type(module) for module in bert().modules()]
