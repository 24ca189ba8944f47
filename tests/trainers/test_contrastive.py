"""Contrastive training: the loss, clusters and their batches, what is trained, the stages of CLIP-MoE."""

import copy
import math

import pytest
import torch
from common.tiny_clip import clip_inputs, make_clip, make_moe_clip
from common.tiny_training import arguments

from hf_moe import upcycle_clip
from hf_moe.trainers import (
    ClusterBatchSampler,
    ContrastiveConfig,
    ContrastiveTrainer,
    cluster_pairs,
    contrastive_loss,
    encode_pairs,
    multistage_contrastive_learning,
    retrieval_recall,
    zero_shot_accuracy,
)
from hf_moe.trainers.contrastive_clusters import kmeans


def rows(count, seed=0):
    inputs = clip_inputs(count, seed=seed)
    return [{name: tensor[i] for name, tensor in inputs.items()} for i in range(count)]


def config(folder, **options):
    return arguments(ContrastiveConfig, folder, **{"per_device_train_batch_size": 4, "warmup_steps": 0, **options})


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_pairs_that_are_all_alike_have_the_loss_of_chance(smoothing):
    same = torch.ones(7, 1)
    assert contrastive_loss(same, same, 100.0, smoothing).item() == pytest.approx(math.log(7), abs=1e-5)


def test_perfect_pairs_pay_for_the_smoothing_alone():
    perfect, pairs, smoothing = torch.eye(5), 5, 0.1
    expected = math.log(1 + (pairs - 1) * math.exp(-100)) + smoothing * 100 * (pairs - 1) / pairs
    assert contrastive_loss(perfect, perfect, 100.0, smoothing).item() == pytest.approx(expected, rel=1e-5)


def test_it_is_the_loss_of_clip():
    model, inputs = make_clip(), clip_inputs()
    with torch.no_grad():
        out = model(**inputs, return_loss=True)
    ours = contrastive_loss(out.image_embeds, out.text_embeds, model.logit_scale.exp().item())
    torch.testing.assert_close(ours, out.loss)


def test_the_right_pair_comes_last_among_equals():
    image, text = torch.eye(4), torch.eye(4)[[1, 0, 2, 3]]
    found = retrieval_recall(image, text, ks=(1, 2, 4))
    assert found["image_to_text@1"] == found["text_to_image@1"] == 0.5
    assert found["image_to_text@4"] == 1.0
    same = torch.ones(4, 1)
    assert retrieval_recall(same, same, ks=(1,))["image_to_text@1"] == 0.0
    assert zero_shot_accuracy(image, torch.eye(4), torch.tensor([0, 1, 2, 0])) == 0.75


def test_clusters_are_those_that_were_drawn():
    generator = torch.Generator().manual_seed(0)
    centers = 10 * torch.eye(3)
    right = torch.arange(3).repeat_interleave(20)
    points = centers[right] + 0.1 * torch.randn(60, 3, generator=generator)
    labels = kmeans(points, 3, generator, chunk_size=7)
    assert len({(int(a), int(b)) for a, b in zip(labels, right, strict=True)}) == 3
    with pytest.raises(ValueError, match="`num_clusters` must be from 1 to the number of points"):
        kmeans(points, 61)


def test_labels_of_stages_are_put_together():
    def features(labels):
        return torch.eye(3)[torch.tensor(labels)].repeat_interleave(2, dim=0)

    image, text = features([0, 1, 2, 0]), features([0, 0, 1, 2])
    first = cluster_pairs(image, text)
    pairs = list(zip([0, 0, 1, 1, 2, 2, 0, 0], [0, 0, 0, 0, 1, 1, 2, 2], strict=True))
    assert len(set(first.tolist())) == 4 and int(first.max()) <= 8
    assert all((first[a] == first[b]) == (pairs[a] == pairs[b]) for a in range(8) for b in range(8))
    second = cluster_pairs(image, text, previous=torch.tensor([4] * 4 + [8] * 4))
    assert torch.equal(second // 9, torch.tensor([4] * 4 + [8] * 4))
    assert torch.equal(second % 9, cluster_pairs(image, text))


@pytest.mark.parametrize("processes", [1, 2])
def test_batches_stay_within_a_cluster_and_use_all_that_fills_them(processes):
    labels = torch.tensor([0] * 11 + [1] * 4 + [2] * 3 + [5] * 9)
    sampler = ClusterBatchSampler(labels, 2, seed=1, num_processes=processes)
    batches = list(sampler)
    step = 2 * processes
    assert len(batches) == len(sampler) == sum(n // step for n in (11, 4, 3, 9)) * processes
    for start in range(0, len(batches), processes):
        together = [index for batch in batches[start : start + processes] for index in batch]
        assert len({int(labels[i]) for i in together}) == 1 and len(set(together)) == step
    used = [index for batch in batches for index in batch]
    assert len(used) == len(set(used))
    assert batches == list(ClusterBatchSampler(labels, 2, seed=1, num_processes=processes))
    sampler.set_epoch(1)
    assert list(sampler) != batches
    with pytest.raises(ValueError, match="the largest of 4 clusters has 11"):
        ClusterBatchSampler(labels, 12)


@pytest.mark.parametrize(
    ("part", "expected"),
    [("feed_forward", ".mlp."), ("router", ".mlp.gate."), ("moe", ".mlp."), ("all", "")],
)
def test_only_the_part_asked_for_is_trained(tmp_path, part, expected):
    model = make_moe_clip(router_aux_loss_coef=0.01)
    before = copy.deepcopy(model.state_dict())
    args = config(tmp_path, trained=part, learning_rate=1e-2, max_steps=2, fixed_logit_scale=None)
    ContrastiveTrainer(model, args, train_dataset=rows(8)).train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    if part == "feed_forward":
        assert all(".mlp.experts." in name for name in changed)
    else:
        assert all(expected in name for name in changed)
    if part == "moe":
        assert {name.rpartition(".mlp.")[2].partition(".")[0] for name in changed} == {"experts", "gate"}
    if part == "router":
        assert changed == {name for name in before if name.endswith(".mlp.gate.weight")}


def test_router_tuning_balances_both_towers(tmp_path):
    logs = []
    for coefficient in (0.1, 0.0):
        model = make_moe_clip(router_aux_loss_coef=coefficient)
        args = config(tmp_path, trained="router", logging_steps=1)
        trainer = ContrastiveTrainer(model, args, train_dataset=rows(4))
        trainer.train()
        logs.append(trainer.state.log_history[0])
    # The log has the mean of the towers, the loss their sum.
    assert logs[0]["loss"] - logs[1]["loss"] == pytest.approx(0.1 * 2 * logs[0]["aux_loss"], abs=1e-4)
    assert logs[0]["aux_loss"] > 0.99
    assert model.logit_scale.item() == pytest.approx(math.log(100), rel=1e-6)


def test_a_dense_clip_has_no_routers_to_tune(tmp_path):
    with pytest.raises(ValueError, match="`trained='router'`, but CLIPModel has no parameters of that kind"):
        ContrastiveTrainer(make_clip(), config(tmp_path, trained="router"), train_dataset=rows(4))
    with pytest.raises(ValueError, match=r"one label for each row of `train_dataset` \(4\), got 3"):
        ContrastiveTrainer(make_clip(), config(tmp_path), train_dataset=rows(4), clusters=[0, 0, 0])
    with pytest.raises(ValueError, match="`trained` must be one of"):
        config(tmp_path, trained="heads")
    with pytest.raises(ValueError, match="`label_smoothing` must be at least 0 and below 1"):
        config(tmp_path, label_smoothing=1.0)


def test_stages_make_experts_of_one_base(tmp_path):
    base, data = make_clip(), rows(24)
    before = copy.deepcopy(base.state_dict())
    args = config(tmp_path, learning_rate=1e-2, per_device_train_batch_size=2, max_steps=3)
    models, labels = multistage_contrastive_learning(base, data, args, num_stages=2, num_clusters=2)
    assert len(models) == 3 and models[0] is base
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    for model in models[1:]:
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed and all(".mlp." in name for name in changed)
    assert torch.equal(labels[1] // 4, labels[0])
    moe = upcycle_clip(base, models)
    image, text = encode_pairs(moe, data, batch_size=5)
    assert image.shape == text.shape == (24, 24)
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(24))


def test_training_brings_pairs_together(tmp_path):
    base = make_clip()
    args = config(tmp_path, learning_rate=3e-3, max_steps=20, fixed_logit_scale=None, per_device_train_batch_size=8)
    trainer = ContrastiveTrainer(base, args, train_dataset=rows(8))
    first = trainer.evaluate(rows(8))["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows(8))["eval_loss"] < first - 0.2


def test_a_second_stage_learns_what_the_first_could_not_tell_apart():
    """Two factors: the base sees the first; within its clusters only the second separates pairs."""
    generator = torch.Generator().manual_seed(0)
    shape, colour = torch.randint(2, (64,), generator=generator), torch.randint(2, (64,), generator=generator)
    seen = torch.eye(2)[shape] + 0.01 * torch.randn(64, 2, generator=generator)
    labels = cluster_pairs(seen, seen, num_clusters=2)
    for label in labels.unique():  # a batch of one cluster has one shape, so shape cannot help
        members = labels == label
        assert len(shape[members].unique()) == 1
        assert len(colour[members].unique()) == 2


def test_balance_of_towers_is_the_same_however_a_step_is_cut(tmp_path):
    from transformers import TrainerCallback

    from hf_moe import MoeClipForImageClassification
    from hf_moe.trainers import MoeTrainer, MoeTrainingArguments

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    found = []
    data = [{"pixel_values": row["pixel_values"], "labels": torch.tensor(i % 3)} for i, row in enumerate(rows(8))]
    for size, steps in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        # All of a step's frequencies come first, so that the cut makes no difference at all.
        clip = make_moe_clip(num_labels=3, router_aux_loss_coef=0.5, balance_mode="lagged").config
        model = MoeClipForImageClassification(clip)
        args = arguments(
            MoeTrainingArguments, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            max_steps=2, learning_rate=0.0, train_sampling_strategy="sequential", remove_unused_columns=False,
        )  # fmt: skip
        MoeTrainer(model, args, train_dataset=data, callbacks=[Keep()]).train()
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[3][name], gradient, rtol=1e-4, atol=1e-6)
    assert found[1]["vision_model.encoder.layers.0.mlp.gate.weight"].abs().sum() > 0
