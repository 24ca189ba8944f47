"""MoTE from a dense model: start, training of experts and routers alone, export."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_moe import export_ternary, upcycle_mote
from hf_moe.experts import TernaryExperts
from hf_moe.quickstart.data import TokenBlocks
from hf_moe.trainers import MoeTrainingArguments, MoteTrainer, train_only_experts


IDS = torch.arange(32).view(2, 16)


@pytest.fixture(scope="module")
def dense():
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def arguments(folder, **fields):
    return MoeTrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        **fields,
    )


def test_scale_zero_starts_from_the_dense_model(dense):
    moe, report = upcycle_mote(dense, init_output_scale=0)
    assert report.predicted_exact
    torch.testing.assert_close(logits(moe), logits(dense))


def test_the_start_is_the_dense_output_and_one_weighted_ternary_expert(dense):
    moe, report = upcycle_mote(dense, check=False)
    assert not report.predicted_exact and "beside the dense feed-forward" in report.reason
    block = moe.model.layers[0].mlp
    tokens = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        routing = block.gate(tokens)
        assert (routing.top_k_weights < 1).all()  # not renormalised: else the router would have no gradient
        every = block.experts(tokens[0], torch.zeros(7, 1, dtype=torch.long), routing.top_k_weights)
        expected = dense.model.layers[0].mlp(tokens)[0] + every  # all experts are equal, so which one does not matter
        torch.testing.assert_close(block(tokens)[0][0], expected)


@pytest.fixture(scope="module")
def trained(dense, tmp_path_factory):
    moe, _ = upcycle_mote(dense, check=False)
    before = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    blocks = torch.randint(0, 48, (8, 16), generator=torch.Generator().manual_seed(0))
    trainer = MoteTrainer(
        moe, arguments(tmp_path_factory.mktemp("mote"), weight_decay=0.1), train_dataset=TokenBlocks(blocks)
    )
    trainer.train()
    return trainer, before


def test_only_routers_and_ternary_experts_change(trained):
    trainer, before = trained
    after = trainer.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".mlp.experts." in name or name.endswith(".mlp.gate.weight")}
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    trainable = {id(p) for name, p in trainer.model.named_parameters() if name in changed}
    assert held == trainable


def test_weight_decay_is_kept_from_the_experts(trained):
    trainer, _ = trained
    decayed = trainer.get_decay_parameter_names(trainer.model)
    assert decayed and not [name for name in decayed if ".experts." in name]


def test_training_reduces_the_loss(trained):
    trainer, before = trained
    ids = trainer.train_dataset.blocks
    with torch.no_grad():
        trainer.model.eval()
        after = trainer.model(input_ids=ids, labels=ids).loss
        current = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        trainer.model.load_state_dict(before)
        first = trainer.model(input_ids=ids, labels=ids).loss
        trainer.model.load_state_dict(current)
    assert after < first - 0.05


def test_the_trained_model_is_exported_with_equal_outputs(trained):
    model = trained[0].model.eval()
    model.set_experts_implementation("eager")
    expected = logits(model)
    export_ternary(model)
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match=r"a packed one becomes trainable by `model.dequantize\(\)`"):
        train_only_experts(model)
    assert train_only_experts(model.dequantize()) > 0


def test_the_router_has_a_gradient_with_one_expert_per_token(dense):
    moe, _ = upcycle_mote(dense, check=False, router_aux_loss_coef=0.0)
    moe.train()
    moe(input_ids=IDS, labels=IDS).loss.backward()
    assert moe.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


def test_wrong_arguments_are_refused(dense):
    with pytest.raises(ValueError, match="`init_output_scale` must be at least 0 and finite, got -1"):
        upcycle_mote(dense, init_output_scale=-1)
    with pytest.raises(ValueError, match=r"`expert_config\['scale'\]` must be one of"):
        upcycle_mote(dense, weight_scale="column")
    with pytest.raises(ValueError, match="has no ternary experts to train"):
        MoteTrainer(dense)
    assert all(parameter.requires_grad for parameter in dense.parameters())


def test_sizes_are_those_of_the_paper():
    """Qwen2.5-3B, 36 layers: four BF16 experts 18.14 GiB, a BF16 shared and four 2-bit ones 6.80 GiB."""
    config = LlamaConfig(hidden_size=2048, moe_intermediate_size=11008)
    config.num_experts, config.expert_activation = 4, "silu"
    from hf_moe.quantization.mote.experts import PackedTernaryExperts

    with torch.device("meta"):
        bank = TernaryExperts(config)
        packed = PackedTernaryExperts.like(bank, "2bit")
    weights, gib = sum(p.numel() for p in bank.parameters()), 2**30
    assert 36 * 2 * weights / gib == pytest.approx(18.14, abs=0.005)
    ternary = 36 * sum(b.nbytes for b in packed.buffers())
    assert (ternary + 36 * 2 * weights / 4) / gib == pytest.approx(6.80, abs=0.005)
