"""The loss of labelled positions alone is TRL's, in value, gradients and logs."""

import pytest
import torch
from common.tiny_training import arguments, completions, third_party_warnings, tiny_moe, tiny_words
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from hf_moe.trainers import MoeSFTConfig, MoeSFTTrainer, labelled_loss
from hf_moe.trainers.labelled_loss import LabelledSFTTrainer


pytestmark = third_party_warnings


class SparseTrainer(MoeSFTTrainer, LabelledSFTTrainer):
    pass


def dense():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.2))


def build(cls, config, model, folder, **options):
    args = arguments(config, folder, per_device_train_batch_size=4, **options)
    return cls(model, args=args, train_dataset=completions(8), processing_class=tiny_words())


def one_step(trainer, items=None):
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
    loss.backward()
    return loss.detach(), [p.grad for p in trainer.model.parameters()], trainer._metrics["train"]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("items", [None, torch.tensor(50)])
def test_loss_gradients_and_logs_are_those_of_trl(tmp_path, monkeypatch, sparse, items):
    stock = (MoeSFTTrainer, MoeSFTConfig) if sparse else (SFTTrainer, SFTConfig)
    ours = (SparseTrainer, MoeSFTConfig) if sparse else (LabelledSFTTrainer, SFTConfig)
    monkeypatch.setattr(labelled_loss, "CHUNK", 5)
    (loss, grads, metrics), (expected, expected_grads, expected_metrics) = (
        one_step(build(*kind, tiny_moe() if sparse else dense(), tmp_path), items) for kind in (ours, stock)
    )
    torch.testing.assert_close(loss, expected)
    for one, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other)
    for name in ("entropy", "mean_token_accuracy", "num_tokens"):
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-5), name


def test_only_labelled_positions_reach_the_head(tmp_path):
    trainer = build(LabelledSFTTrainer, SFTConfig, dense(), tmp_path)
    rows = []
    trainer.model.lm_head.register_forward_hook(lambda _m, args, _o: rows.append(args[0].shape[:-1].numel()))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, dict(batch))
    assert rows[-1] == (batch["labels"] != -100).sum() < batch["input_ids"].numel()
    assert rows[:-1] == [len(batch["input_ids"])]  # the model's own head, for the last positions


def test_batches_without_labels_and_other_losses_train(tmp_path):
    trainer = build(LabelledSFTTrainer, SFTConfig, dense(), tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    loss = trainer.compute_loss(trainer.model, empty)
    loss.backward()
    assert loss == 0
    trainer = build(LabelledSFTTrainer, SFTConfig, dense(), tmp_path, loss_type="dft")
    torch.testing.assert_close(
        trainer.compute_loss(trainer.model, dict(batch)),
        build(SFTTrainer, SFTConfig, dense(), tmp_path, loss_type="dft").compute_loss(trainer.model, dict(batch)),
    )
