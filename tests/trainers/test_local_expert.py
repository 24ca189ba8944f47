"""The trainer of local experts: labels, threshold, statistics, and the whole recipe on the sheet's three blobs."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from hf_moe import LocalExpertConfig
from hf_moe.trainers import GenericStatistics, LocalExpertTrainer, LocalExpertTrainingArguments
from hf_moe.trainers.local_expert_features import HeadFeatures
from hf_moe.trainers.local_expert_labels import calibrate_threshold, gate_labels


RIGHT_GLOBAL = torch.tensor([1, 1, 0, 0, 1, 0]).bool()
RIGHT_LOCAL = torch.tensor([0, 1, 1, 1, 0, 0]).bool()


class Classifier(nn.Module):
    """8 -> 32 -> 16 -> 3."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


def blobs(size, generator, custom=False):
    """Three Gaussian blobs; for the user, classes 0 and 1 are swapped and feature 3 is shifted."""
    labels = torch.randint(3, (size,), generator=generator)
    means = torch.zeros(3, 8)
    means[0, 0], means[1, 0], means[2, 1] = 3.0, -3.0, 4.0
    x = means[labels] + 0.7 * torch.randn(size, 8, generator=generator)
    if custom:
        x[:, 3] += 3.0
        labels = torch.tensor([1, 0, 2])[labels]
    return [{"x": row, "labels": label} for row, label in zip(x, labels, strict=True)]


def global_expert(generator):
    model = Classifier()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    rows = blobs(2000, generator)
    x, labels = torch.stack([row["x"] for row in rows]), torch.stack([row["labels"] for row in rows])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model.eval()


def trainer_of(model, folder, generator, generic=None, **options):
    settings = {
        "report_to": [],
        "use_cpu": True,
        "num_train_epochs": 20,
        "per_device_train_batch_size": 50,
        "learning_rate": 3e-2,
        "seed": 0,
    } | options
    args = LocalExpertTrainingArguments(folder, **settings)
    return LocalExpertTrainer(
        model,
        args,
        custom_dataset=blobs(200, generator, custom=True),
        generic=blobs(400, generator) if generic is None else generic,
        eval_custom_dataset=blobs(1000, generator, custom=True),
        eval_generic_dataset=blobs(1000, generator),
    )


def with_local_expert(model, **fields):
    return get_peft_model(model, LocalExpertConfig(target_modules=["head"], **fields))


RAW = {"gate_feature_module": "input", "gate_features": 8}


def test_the_gates_labels():
    custom = torch.ones(6).bool()
    assert gate_labels(RIGHT_GLOBAL, RIGHT_LOCAL, custom).tolist() == [0, -1, 1, 1, 0, -1]
    assert gate_labels(RIGHT_GLOBAL, RIGHT_LOCAL, ~custom).tolist() == [0, 0, 1, 1, 0, -1]
    assert gate_labels(RIGHT_GLOBAL, RIGHT_LOCAL, custom, "domain").tolist() == [1] * 6


def test_accuracy_is_made_of_both_experts():
    gate = torch.tensor([0, 0, 1, 0, 1, 1]).bool()
    answer = torch.where(gate, RIGHT_LOCAL, RIGHT_GLOBAL).double()
    parts = [(~gate, RIGHT_GLOBAL), (gate, RIGHT_LOCAL)]
    composed = sum(rows.double().mean() * right[rows].double().mean() for rows, right in parts)
    assert answer.mean().item() == pytest.approx(composed.item())
    assert answer.mean().item() == 0.5
    assert (RIGHT_GLOBAL | RIGHT_LOCAL).double().mean().item() == pytest.approx(5 / 6)


@pytest.mark.parametrize("allowed", [0.0, 0.1, 0.3, 1.0])
def test_the_threshold_is_the_smallest_that_loses_little_enough(allowed):
    generator = torch.Generator().manual_seed(0)
    gate = torch.rand(200, generator=generator)
    gate[:50] = gate[50]  # ties
    global_right = torch.rand(200, generator=generator) < 0.9
    local_right = torch.rand(200, generator=generator) < 0.6

    def drop(threshold):
        chosen = gate >= threshold
        return (global_right.float() - torch.where(chosen, local_right, global_right).float()).mean().item()

    threshold = calibrate_threshold(gate, global_right, local_right, allowed)
    assert drop(threshold) <= allowed + 1e-7
    smaller = [t for t in [0.0, *gate.tolist()] if t < threshold - 1e-6]
    assert all(drop(t) > allowed for t in smaller)


def test_a_gate_that_must_never_choose_gets_a_threshold_of_never():
    gate = torch.ones(10)
    assert calibrate_threshold(gate, torch.ones(10).bool(), torch.zeros(10).bool(), 0.0) >= 1.0


def test_statistics_are_drawn_as_they_were_taken(tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (4000,), generator=generator)
    f = torch.randn(4000, 3, generator=generator) * 0.5 + labels[:, None] * 4.0
    statistics = GenericStatistics.of(HeadFeatures(f, f[:, :2], torch.zeros(4000, 2), labels), centroids=1)
    statistics.save(tmp_path / "s.safetensors")
    again = GenericStatistics.load(tmp_path / "s.safetensors")
    drawn = again.sample(4000, nn.Linear(3, 2), torch.Generator().manual_seed(1))
    assert drawn.f.shape == (4000, 3) and drawn.q.shape == (4000, 2) and drawn.z_global.shape == (4000, 2)
    for label in (0, 1):
        torch.testing.assert_close(
            drawn.f[drawn.labels == label].mean(0), torch.full((3,), 4.0 * label), atol=0.1, rtol=0
        )
        torch.testing.assert_close(drawn.f[drawn.labels == label].std(0), torch.full((3,), 0.5), atol=0.05, rtol=0)
    assert {file.name for file in tmp_path.iterdir()} == {"s.safetensors"}


def test_the_recipe_serves_the_user_and_spares_the_rest(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = global_expert(generator)
    frozen = {name: value.clone() for name, value in base.state_dict().items()}
    model = with_local_expert(base, **RAW)
    steps = {"num_train_epochs": 25, "per_device_train_batch_size": 16, "learning_rate": 2e-2}
    trainer = trainer_of(model, tmp_path, generator, calibrate=False, **steps)
    trainer.train()
    report = trainer.evaluate()
    assert report["eval_custom_global_accuracy"] < 0.5 and report["eval_generic_global_accuracy"] > 0.98
    assert report["eval_custom_accuracy"] >= 0.95 and report["eval_generic_accuracy"] >= 0.95
    for name in ("custom", "generic"):
        assert report[f"eval_{name}_accuracy"] <= report[f"eval_{name}_oracle_accuracy"]
    assert report["eval_added_parameters"] == 16 * 3 + 3 + 8 + 1
    assert 0 < report["eval_added_flop_fraction"] < 0.1
    after = model.unload().state_dict()
    assert all(torch.equal(after[name], value) for name, value in frozen.items())  # statistics of the norm too


def test_calibration_keeps_generic_accuracy_and_survives_saving(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = global_expert(generator)
    model = with_local_expert(base, **RAW)
    trainer = trainer_of(model, tmp_path / "run", generator, max_generic_drop=0.005)
    trainer.train()
    report = trainer.evaluate()
    assert report["eval_generic_accuracy"] >= report["eval_generic_global_accuracy"] - 0.005 - 1e-9
    assert report["eval_custom_accuracy"] > report["eval_custom_global_accuracy"]
    assert trainer.threshold != 0.5
    trainer.save_model(tmp_path / "adapter")
    x = torch.stack([row["x"] for row in blobs(50, generator, custom=True)])
    model.eval()
    expected = model(x)
    again = PeftModel.from_pretrained(model.unload(), tmp_path / "adapter").eval()
    assert torch.equal(again(x), expected)


def test_statistics_take_the_place_of_generic_data(tmp_path):
    generator = torch.Generator().manual_seed(0)
    model = with_local_expert(global_expert(generator), **RAW)
    statistics = trainer_of(model, tmp_path, generator).collect_statistics(blobs(1000, generator))
    trainer = trainer_of(model, tmp_path, generator, generic=statistics)
    trainer.train()
    report = trainer.evaluate()
    assert report["eval_generic_accuracy"] > 0.9 and report["eval_custom_accuracy"] > 0.8


def test_bad_input_is_named(tmp_path):
    generator = torch.Generator().manual_seed(0)
    model = with_local_expert(Classifier())
    args = LocalExpertTrainingArguments(tmp_path, report_to=[], use_cpu=True)
    rows = blobs(20, generator)
    with pytest.raises(ValueError, match="`model` must have one head"):
        LocalExpertTrainer(Classifier(), args, custom_dataset=rows, generic=rows)
    with pytest.raises(ValueError, match=r"`custom_dataset` needs at least `num_folds` \(5\) examples, got 0"):
        LocalExpertTrainer(model, args, custom_dataset=[], generic=rows)
    with pytest.raises(ValueError, match="`generic` must be"):
        LocalExpertTrainer(model, args, custom_dataset=rows)
    with pytest.raises(ValueError, match="needs `labels`"):
        LocalExpertTrainer(model, args, custom_dataset=[{"x": row["x"]} for row in rows], generic=rows).train()
    with pytest.raises(ValueError, match="`evaluate` needs"):
        LocalExpertTrainer(model, args, custom_dataset=rows, generic=rows).evaluate()
    for name, value in (("num_folds", 1), ("gate_target", "x"), ("max_generic_drop", 2.0), ("error_weight", -1.0)):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            LocalExpertTrainingArguments(tmp_path, **{name: value})
