import importlib.util
import json
import subprocess
import sys

import pytest
import yaml
from common.tiny_training import completions, preferences, third_party_warnings, tiny_moe, tiny_words
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from hf_moe import cli
from hf_moe.trainers import command


pytestmark = third_party_warnings

ROWS = {"sft": completions, "dpo": preferences}
OPTIONS = {
    "balance_mode": "running",
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "activation_checkpointing": False,
    "logging_steps": 1,
}
LORA = ["--use_peft", "--lora_target_parameters", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LORA += ["--lora_target_modules", "q_proj", "v_proj", "--lora_dropout", "0"]


@pytest.fixture
def folder(tmp_path):
    """A folder with a model, data for each script, and the options of a run as `run.yaml`."""
    tiny_moe(balance_mode="micro").save_pretrained(tmp_path / "model")
    tiny_words().save_pretrained(tmp_path / "model")
    for name, rows in ROWS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(4)))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(OPTIONS))
    return tmp_path


def words(name, folder, *more):
    paths = {"model_name_or_path": "model", "dataset_name": name, "output_dir": "out", "config": "run.yaml"}
    return [word for key, path in paths.items() for word in (f"--{key}", str(folder / path))] + list(more)


def run(name, arguments):
    script = importlib.import_module(f"hf_moe.trainers.scripts.{name}")
    script.main(*script.make_parser().parse_args_and_config(arguments, fail_with_unknown_args=False))


@pytest.mark.parametrize("name", ROWS)
def test_a_script_trains_and_saves_a_model_that_loads(name, folder):
    run(name, words(name, folder, "--router_learning_rate", "0.001"))
    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    assert model.config.model_type == "moe_llama" and model.config.balance_mode == "running"
    state = json.loads((folder / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert all(log["aux_loss"] > 0 for log in state["log_history"] if "loss" in log)


@pytest.mark.parametrize("name", ROWS)
def test_a_script_trains_adapters_on_the_experts(name, folder):
    run(name, words(name, folder, *LORA))
    with safe_open(folder / "out" / "adapter_model.safetensors", framework="pt") as file:
        assert any("mlp.experts" in key for key in file.keys())


@pytest.mark.parametrize(("name", "rows"), [("mimic", "sft"), ("preference", "dpo")])
def test_a_student_is_distilled_from_a_teacher(name, rows, folder):
    tiny_moe(seed=1, hidden_size=32).save_pretrained(folder / "teacher")
    arguments = words(rows, folder)
    with pytest.raises(ValueError, match="`teacher_model` is missing"):
        run(name, arguments)
    run(name, [*arguments, "--teacher_model_name_or_path", str(folder / "teacher")])
    assert AutoModelForCausalLM.from_pretrained(folder / "out").config.hidden_size == 16
    state = json.loads((folder / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    logged = {"mimic": "distillation_loss", "preference": "rewards/margins"}[name]
    assert all(logged in log for log in state["log_history"] if "loss" in log)


@pytest.mark.parametrize("name", ROWS)
def test_missing_data_are_named(name, folder):
    arguments = words(name, folder)
    with pytest.raises(ValueError, match=r"`--dataset_train_split dev` is not in the data, which have \['train'\]"):
        run(name, [*arguments, "--dataset_train_split", "dev"])
    del arguments[2:4]
    with pytest.raises(ValueError, match=r"no data to train on\. Give `--dataset_name`"):
        run(name, arguments)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("name", ROWS)
def test_a_script_can_be_a_sub_command_of_another_parser(name):
    from trl import TrlParser

    script = importlib.import_module(f"hf_moe.trainers.scripts.{name}")
    parser = script.make_parser(TrlParser().add_subparsers(parser_class=TrlParser), prog="ignored")
    arguments = ["--model_name_or_path", "m", "--output_dir", "o", "--use_cpu", "--bf16", "False"]
    arguments += ["--activation_checkpointing", "False"]
    _, args, model_args, _ = parser.parse_args_and_config([*arguments, "--balance_mode", "rank"])
    assert args.balance_mode == "rank" and model_args.model_name_or_path == "m"


def test_the_staged_script_makes_the_student_of_the_teacher(folder):
    teacher = [
        "--teacher_model_name_or_path",
        str(folder / "model"),
        "--student_drop_every",
        "2",
        "--kd_stop_step",
        "1",
    ]
    arguments = words("sft", folder, *teacher)
    del arguments[:2]  # no model
    run("staged_distillation", arguments)
    assert AutoModelForCausalLM.from_pretrained(folder / "out").config.num_hidden_layers == 1
    state = json.loads((folder / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert ["kd_loss" in log for log in state["log_history"] if "loss" in log] == [True, False]


def test_the_staged_script_trains_a_given_student_with_adapters(folder):
    tiny_moe(seed=1).save_pretrained(folder / "teacher")
    run("staged_distillation", words("sft", folder, "--teacher_model_name_or_path", str(folder / "teacher"), *LORA))
    with safe_open(folder / "out" / "adapter_model.safetensors", framework="pt") as file:
        assert any("mlp.experts" in key for key in file.keys())


def test_names_with_a_hyphen_find_their_script(folder, monkeypatch):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    assert cli.main(["train", "staged-distillation", *words("sft", folder, "--kd_stop_step", "3")]) == 0
    assert launched[0].training_script == "hf_moe.trainers.scripts.staged_distillation"


def test_train_hands_accelerate_its_arguments_and_the_script_the_rest(folder, monkeypatch):
    (folder / "run.yaml").write_text(yaml.safe_dump({**OPTIONS, "num_machines": 1}))
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    own = words("sft", folder, "--gradient_accumulation_steps", "2")
    assert cli.main(["train", "sft", *own, "--multi_gpu", "--num_processes", "2", "--debug"]) == 0
    (args,) = launched
    assert (args.multi_gpu, args.num_processes, args.num_machines, args.module) == (True, 2, 1, True)
    assert args.training_script == "hf_moe.trainers.scripts.sft"
    assert args.training_script_args == own


def test_train_refuses_an_unknown_method(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "ppo"])
    assert "invalid choice: 'ppo'" in capsys.readouterr().err
    assert {*ROWS, "staged-distillation", "unlearning"} <= set(command.METHODS)
    assert all(importlib.util.find_spec(command.script_module(method)) for method in command.METHODS)


@pytest.mark.slow
@pytest.mark.parametrize("start", [["-m", "hf_moe.trainers.scripts.sft"], ["-m", "hf_moe.cli", "train", "sft"]])
def test_the_command_line_trains(start, folder):
    done = subprocess.run(
        [sys.executable, *start, *words("sft", folder)], capture_output=True, text=True, timeout=240, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "out" / "model.safetensors").is_file() and "Model saved to" in done.stdout
