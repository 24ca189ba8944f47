"""Guidance distillation: the loss, what trains, checkpoints, and a denoiser that learns to guide itself."""

import pytest
import torch
from common.tiny_denoisers import PlainDenoiser, latents, tiny_dit
from diffusers import DDIMScheduler
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from transformers import TrainingArguments

from hf_moe import AgdConfig
from hf_moe.adapters.agd import AgdDataset, DenoisingLoop, agd_guidance, record_trajectories
from hf_moe.trainers import GuidanceDistillationConfig, GuidanceDistillationTrainer


PLAIN = {"target_modules": ["attn"], "hidden_size": 16, "condition_modules": {"class": "label"}}
PLAIN |= {"condition_on": ("scale", "timestep", "class")}


class Euler:
    def set_timesteps(self, number):
        self.timesteps = torch.linspace(1000, 50, number)

    def step(self, prediction, t, x):
        return x - prediction / len(self.timesteps)


def guidable():
    """A denoiser whose classes matter about as much as its noise."""
    net = PlainDenoiser()
    with torch.no_grad():
        net.label.weight.mul_(0.3)
    return net


def trajectories(folder, net=None, number=40, steps=5, **settings):
    loop = DenoisingLoop(net or guidable(), Euler(), (4, 6), {"c": 5}, steps)
    classes = {"c": torch.arange(number) % 5}
    settings = {"scale_range": (1.0, 6.0), "shard_size": number, "dtype": "float32"} | settings
    return AgdDataset(record_trajectories(loop, classes, folder, **settings), in_memory=True)


def arguments(folder, **settings):
    settings = {"max_steps": 4, "per_device_train_batch_size": 8, "logging_steps": 1000} | settings
    settings |= {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    return GuidanceDistillationConfig(str(folder), **settings)


def batch_of(dataset, numbers):
    items = [dataset[number] for number in numbers]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def test_defaults_are_those_of_the_reference():
    args = GuidanceDistillationConfig("out", use_cpu=True)
    assert (args.learning_rate, args.weight_decay, args.max_steps, args.per_device_train_batch_size) == (
        1e-4, 0.0, 5000, 64,
    )  # fmt: skip
    assert args.get_warmup_steps(5000) == 500 and args.remove_unused_columns is False
    with pytest.raises(ValueError, match="`loss_type` must be one of"):
        GuidanceDistillationConfig("out", loss_type="huber")


def test_the_schedule_warms_up_and_returns(tmp_path):
    args = arguments(tmp_path, max_steps=100)
    trainer = GuidanceDistillationTrainer(
        PlainDenoiser(), args, train_dataset=trajectories(tmp_path / "t"), peft_config=AgdConfig(**PLAIN)
    )
    scheduler = trainer.create_scheduler(100, torch.optim.AdamW(trainer.model.parameters(), lr=1.0))
    rates = []
    for _ in range(100):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(1e-4) and rates[9] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize("loss_type", ["l2", "l1", "weighted_l2"])
def test_the_first_loss_is_what_guidance_changes(loss_type, tmp_path):
    dataset = trajectories(tmp_path / "t", store_conditional=True)
    trainer = GuidanceDistillationTrainer(
        guidable(), arguments(tmp_path, loss_type=loss_type), train_dataset=dataset, peft_config=AgdConfig(**PLAIN)
    )
    batch = batch_of(dataset, [0, 7, 31])
    loss = trainer.compute_loss(trainer.model, batch)
    difference = batch["agd_conditional"] - batch["agd_target"]
    weight = 1 - torch.nn.functional.cosine_similarity(
        batch["agd_conditional"].flatten(1), batch["agd_target"].flatten(1)
    )
    expected = {
        "l2": difference.square().mean(),
        "l1": difference.abs().mean(),
        "weighted_l2": (0.5 * weight[:, None, None] * difference.square()).mean(),
    }
    torch.testing.assert_close(loss, expected[loss_type], rtol=1e-4, atol=1e-6)
    assert loss > 0


def test_the_learned_variance_is_not_compared(tmp_path):
    model = tiny_dit()
    loop = DenoisingLoop(model, DDIMScheduler(), (2, 8, 8), {"class_labels": 5}, 3)
    labels = {"class_labels": torch.tensor([0, 1, 2, 3])}
    dataset = AgdDataset(record_trajectories(loop, labels, tmp_path / "t", scale_range=(1, 6), dtype="float32"))
    trainer = GuidanceDistillationTrainer(
        model, arguments(tmp_path), train_dataset=dataset, peft_config=AgdConfig(hidden_size=8)
    )
    seen = []

    def watch(module, args, output):
        output.sample.register_hook(seen.append)

    model.register_forward_hook(watch)
    trainer.compute_loss(trainer.model, batch_of(dataset, [0, 4, 8])).backward()
    gradient = seen[0]
    assert gradient.shape[1] == 4
    assert gradient[:, :2].abs().max() > 0 and gradient[:, 2:].abs().max() == 0


def test_the_base_stays_in_eval_mode_and_as_it_was(tmp_path):
    model = tiny_dit()
    loop = DenoisingLoop(model, DDIMScheduler(), (2, 8, 8), {"class_labels": 5}, 3)
    labels = {"class_labels": torch.tensor([0, 1, 2, 3])}
    record_trajectories(loop, labels, tmp_path / "t", scale_range=(2, 6))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = []
    model.transformer_blocks[0].norm1.emb.class_embedder.register_forward_hook(
        lambda module, args, output: modes.append(module.training)
    )
    trainer = GuidanceDistillationTrainer(
        model,
        arguments(tmp_path, activation_checkpointing=True),
        train_dataset=AgdDataset(tmp_path / "t"),
        peft_config=AgdConfig(hidden_size=8, dropout=0.1),
    )
    assert model.gradient_checkpointing
    trainer.train()
    assert modes and not any(modes)  # in training mode DiT drops a tenth of the labels
    after = trainer.model.unload().state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_checkpoints_hold_the_adapter_and_resume(tmp_path):
    dataset = trajectories(tmp_path / "t")

    def trainer(**settings):
        torch.manual_seed(0)
        model = get_peft_model(guidable(), AgdConfig(**PLAIN))
        args = arguments(tmp_path / "out", max_steps=4, **settings)
        args.save_strategy, args.save_steps = "steps", 2
        return GuidanceDistillationTrainer(model, args, train_dataset=dataset, eval_dataset=dataset)

    whole = trainer()
    whole.train()
    assert whole.evaluate()["eval_loss"] > 0
    folder = tmp_path / "out" / "checkpoint-2"
    assert (folder / "adapter_model.safetensors").exists() and not (folder / "model.safetensors").exists()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(folder))
    again = resumed.model.state_dict()
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-6)
    loaded = PeftModel.from_pretrained(guidable(), tmp_path / "out" / "checkpoint-4")
    assert loaded.peft_config["default"].guidance_range == (1.0, 6.0)  # the dataset's
    with pytest.warns(UserWarning, match="outside `guidance_range`"), agd_guidance(loaded, 7.0):
        loaded(latents(1, (4, 6)), torch.tensor([3]), torch.tensor([0]))


def test_wrong_models_and_datasets_are_refused(tmp_path):
    dataset = trajectories(tmp_path / "t")
    with pytest.raises(ValueError, match="has no AGD adapter"):
        GuidanceDistillationTrainer(PlainDenoiser(), arguments(tmp_path), train_dataset=dataset)
    model = inject_adapter_in_model(AgdConfig(hidden_size=8), tiny_dit())
    with pytest.raises(TypeError, match="no PEFT model"):
        GuidanceDistillationTrainer(model, arguments(tmp_path), train_dataset=dataset)
    with pytest.raises(TypeError, match="`args` must be a GuidanceDistillationConfig"):
        GuidanceDistillationTrainer(PlainDenoiser(), TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="store_conditional"):
        GuidanceDistillationTrainer(
            PlainDenoiser(),
            arguments(tmp_path, loss_type="weighted_l2"),
            train_dataset=dataset,
            peft_config=AgdConfig(**PLAIN),
        )


@pytest.mark.parametrize("architecture", ["offset", pytest.param("cross_attention", marks=pytest.mark.slow)])
def test_a_denoiser_learns_to_guide_itself(architecture, tmp_path):
    net = guidable()
    train = trajectories(tmp_path / "train", net, number=200, steps=10)
    held_out = trajectories(tmp_path / "test", net, number=40, steps=10, seed=1)
    torch.manual_seed(0)
    trainer = GuidanceDistillationTrainer(
        net,
        arguments(tmp_path, max_steps=300, per_device_train_batch_size=64, learning_rate=3e-3),
        train_dataset=train,
        eval_dataset=held_out,
        peft_config=AgdConfig(architecture=architecture, **PLAIN),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert before > 0.05 and after < 0.15 * before
    # and its samples go where the teacher's go, with half the work
    loop = DenoisingLoop(trainer.model, Euler(), (4, 6), {"c": 5}, 10)
    classes = {"c": torch.arange(20) % 5}

    def noise():
        return torch.Generator().manual_seed(7)

    teacher = loop.guided(classes, 5.0, noise())
    with trainer.model.disable_adapter():
        plain = loop.single(classes, noise())
    with agd_guidance(trainer.model.eval(), 5.0):
        student = loop.single(classes, noise())
    assert (student - teacher).square().mean() < 0.3 * (plain - teacher).square().mean()
