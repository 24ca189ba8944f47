"""CLIP-MoE in one run: stages kept and gone on with, settings refused, the script from a folder of pictures."""

import importlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from common.tiny_clip import clip_inputs, make_clip
from common.tiny_training import arguments, third_party_warnings
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, CLIPImageProcessorPil, CLIPProcessor, TrainerCallback, pipeline

from hf_moe import MoeClipModel, moe_layers
from hf_moe.trainers import ClipMoeConfig, ContrastiveTrainer, command, train_clip_moe
from hf_moe.trainers.contrastive_stages import cluster_stage, train_stage


pytestmark = third_party_warnings

SCRIPT = importlib.import_module("hf_moe.trainers.scripts.clip_moe")


def rows(count=24):
    inputs = clip_inputs(count)
    return [{name: tensor[i] for name, tensor in inputs.items()} for i in range(count)]


def config(folder, **options):
    few = {"num_experts": 3, "num_clusters": 2, "warmup_steps": 0, "max_steps": 3, "router_learning_rate": 0.01}
    return arguments(ClipMoeConfig, folder, **{**few, "expert_dropout": 0.0, **options})


def test_experts_are_the_base_and_its_stages(tmp_path):
    base = make_clip()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    trainer = train_clip_moe(base, config(tmp_path, fixed_logit_scale=None), rows(), eval_dataset=rows(6))
    moe = trainer.model
    assert isinstance(moe, MoeClipModel)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    for layer in moe_layers(moe):
        bank, fc1 = layer.experts.up_proj, before[f"{layer.name}.fc1.weight"]
        assert torch.equal(bank[0], fc1) and not torch.equal(bank[1], fc1) and not torch.equal(bank[1], bank[2])
    shared = {name: tensor for name, tensor in moe.state_dict().items() if ".mlp." not in name}
    assert all(torch.equal(tensor, before[name]) for name, tensor in shared.items() if name in before)
    found = json.loads((tmp_path / "eval_results.json").read_text())
    assert {"eval_dense_image_to_text@1", "eval_moe_text_to_image@5"} <= found.keys()


class Interruption(TrainerCallback):
    def __init__(self, output, step):
        self.output, self.step = output, step

    def on_step_begin(self, args, state, control, **kwargs):
        if args.output_dir.endswith(self.output) and state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("where", [("stage-1", 2), ("stage-2", 0), ("tuning", 2)])
def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path, monkeypatch, where):
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = train_clip_moe(make_clip(), config(tmp_path / "whole", **options), rows()).model
    make = ContrastiveTrainer.__init__

    def make_and_interrupt(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self.add_callback(Interruption(*where))

    with monkeypatch.context() as patched:
        patched.setattr(ContrastiveTrainer, "__init__", make_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_clip_moe(make_clip(), config(tmp_path / "cut", **options), rows())
    again = config(tmp_path / "cut", resume_from_checkpoint="True", **options)
    resumed = train_clip_moe(make_clip(), again, rows()).model
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_runs_are_not_mixed(tmp_path):
    train_clip_moe(make_clip(), config(tmp_path, experts="copies"), rows())
    with pytest.raises(ValueError, match=r"holds an earlier run\. Pass `resume_from_checkpoint=True`"):
        train_clip_moe(make_clip(), config(tmp_path), rows())
    other = config(tmp_path, experts="copies", num_clusters=3, resume_from_checkpoint="True")
    with pytest.raises(ValueError, match="other settings: num_clusters 2 instead of 3, rows 24 instead of 20"):
        train_clip_moe(make_clip(), other, rows(20))
    assert not (tmp_path / "stage-1").exists()


def test_stages_have_batches_of_their_own(tmp_path):
    """Stages that learn nothing find the same clusters again, and yet do not repeat each other."""
    base, data, args = make_clip(), rows(), config(tmp_path, router_learning_rate=None)
    labels = cluster_stage(base, data, args, 1, None, 2)
    assert torch.equal(labels, cluster_stage(base, data, args, 1, None, 2))
    trained = [train_stage(base, data, args, stage, labels)[0] for stage in (1, 2, 1)]
    weights = [model.vision_model.encoder.layers[0].mlp.fc1.weight for model in trained]
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[1])


def test_copies_become_different_in_the_tuning(tmp_path):
    args = config(tmp_path, experts="copies", vision_layers="1,2", text_layers="none", tuning_steps=2)
    trainer = train_clip_moe(make_clip(), args, rows())
    layers = moe_layers(trainer.model)
    assert trainer.state.global_step == 2 and [layer.name.split(".")[3] for layer in layers] == ["1", "2"]
    assert not torch.equal(layers[0].experts.up_proj[0], layers[0].experts.up_proj[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": "random"}, "`experts` must be one of"),
        ({"num_experts": 1}, "`num_experts` must be at least 2, got 1"),
        ({"num_experts_per_tok": 4}, r"`num_experts_per_tok` must be from 1 to `num_experts` \(3\), got 4"),
        ({"num_clusters": 1}, "`num_clusters` must be at least 2"),
        ({"expert_dropout": 1.0}, "`expert_dropout` must be at least 0 and below 1"),
        ({"tuning_steps": 0}, "`tuning_steps` must be at least 1"),
        ({"trained": "router"}, "`trained='router'` must be left out"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_other_models_are_refused(tmp_path):
    with pytest.raises(TypeError, match="`base` must be a dense CLIPModel, got CLIPTextModel"):
        train_clip_moe(make_clip().text_model, config(tmp_path), rows())
    with pytest.raises(ValueError, match="Use smaller batches, fewer clusters"):
        train_clip_moe(make_clip(), config(tmp_path / "out", per_device_train_batch_size=23), rows())


@pytest.fixture
def folder(tmp_path, tiny_tokenizer):
    """A CLIP with its processor, and a folder of pictures with captions."""
    tiny_tokenizer.add_special_tokens({"eos_token": "</s>"})
    make_clip(vocab_size=len(tiny_tokenizer), eos_token_id=tiny_tokenizer.eos_token_id).save_pretrained(
        tmp_path / "clip"
    )
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPProcessor(CLIPImageProcessorPil(**size), tiny_tokenizer).save_pretrained(tmp_path / "clip")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    with (pictures / "metadata.jsonl").open("w") as file:
        for i in range(16):
            Image.new("RGB", (20, 18), (15 * i, 200, 255 - 15 * i)).save(pictures / f"{i}.png")
            text = "the old mill " + "by the river " * (i % 3)
            file.write(json.dumps({"file_name": f"{i}.png", "text": text}) + "\n")
    return tmp_path


def run(folder, *more, model="clip"):
    words = ["--model_name_or_path", str(folder / model), "--dataset_name", str(folder / "pictures")]
    words += ["--output_dir", str(folder / "out"), "--num_experts", "2", "--num_clusters", "2", "--max_steps", "2"]
    words += ["--per_device_train_batch_size", "2", "--use_cpu", "--bf16", "False", "--report_to", "none"]
    words += ["--disable_tqdm", "true", "--dataloader_pin_memory", "false", "--activation_checkpointing", "False"]
    SCRIPT.main(*SCRIPT.make_parser().parse_args_and_config([*words, *more], fail_with_unknown_args=False))


def test_the_script_makes_a_model_that_loads_and_classifies(folder):
    run(folder, "--stretch_positions")
    model = AutoModel.from_pretrained(folder / "out")
    assert model.config.model_type == "moe_clip" and model.config.text_config.max_position_embeddings == 36
    images = CLIPImageProcessorPil.from_pretrained(folder / "out")
    classify = pipeline("zero-shot-image-classification", model=str(folder / "out"), image_processor=images)
    found = classify(Image.new("RGB", (20, 18), (200, 30, 30)), candidate_labels=["the old mill", "a river"])
    assert sum(row["score"] for row in found) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="holds an earlier run"):
        run(folder, "--stretch_positions")
    run(folder, "--stretch_positions", "--resume_from_checkpoint", "True")


def test_the_script_says_what_is_wrong_before_it_trains(folder):
    for more, message in (
        (
            ["--text_column", "caption"],
            r"`--text_column caption` is not in `train_dataset`, .*\['image', 'text'\]",
        ),
        (["--image_column", "text"], "`--image_column text` must hold images, got str"),
        (["--use_peft"], "`--use_peft`, `--load_in_4bit` and `--load_in_8bit` must be left out"),
        (["--dataset_streaming"], "`--dataset_streaming` must be left out"),
    ):
        with pytest.raises(ValueError, match=message):
            run(folder, *more)
    make_clip().text_model.save_pretrained(folder / "text")
    with pytest.raises(ValueError, match="must be a dense CLIP"):
        run(folder, model="text")
    shutil.copytree(folder / "clip", folder / "bare", ignore=shutil.ignore_patterns("*processor*"))
    with pytest.raises(ValueError, match=r"`--model_name_or_path .*bare` has "):
        run(folder, model="bare")
    assert not (folder / "out").exists()


def test_hf_moe_train_tells_its_arguments_from_those_of_accelerate():
    words = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", "--experts", "copies"]
    launch, script = command.split_arguments("clip-moe", [*words, "--num_processes", "2"])
    assert launch == ["--num_processes", "2"] and script == words


@pytest.mark.slow
def test_two_processes_find_the_clusters_of_one(folder):
    """Each encodes half of the pairs."""
    run(folder)
    words = ["--model_name_or_path", "clip", "--dataset_name", "pictures", "--output_dir", "two", "--num_experts", "2"]
    words += ["--num_clusters", "2", "--max_steps", "2", "--per_device_train_batch_size", "1", "--use_cpu"]
    words += ["--bf16", "False", "--report_to", "none", "--dataloader_pin_memory", "false"]
    words += ["--activation_checkpointing", "False", "--multi_gpu", "--num_processes", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "hf_moe.cli", "train", "clip-moe", *words],
        capture_output=True, text=True, timeout=400, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(folder / name / "stage-1" / "clusters.safetensors")["labels"] for name in ("out", "two"))
    assert torch.equal(one, two)
    assert AutoModel.from_pretrained(folder / "two").config.model_type == "moe_clip"
