"""Fixed texts routed again and again during training: what is logged, where, when and how many keys."""

import json

import pytest
import torch
from common.tiny_families import tiny_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_moe
from hf_moe.reporting import RoutingReportCallback, routing_report, routing_shift, routing_snapshot


TEXTS = ["The river runs past the old mill and down to the sea.", "A miller kept 3 cats.", "def add(a, b): return a"]
KEYS = {
    "active_experts",
    "best_shift",
    "class_shift",
    "dead_share",
    "entropy",
    "load_entropy",
    "load_shift",
    "max_violation",
    "max_violation_worst_layer",
    "position_shift",
    "probability_shift",
    "selection_shift",
    "selection_shift_worst_layer",
    "token_shift",
}


@pytest.fixture
def make_trainer(tmp_path, generator):
    def make(model=None, **options):
        ids = torch.randint(3, 384, (8, 12), generator=generator)
        rows = [{"input_ids": row, "labels": row.clone()} for row in ids]
        defaults = {
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "logging_strategy": "no",
            "learning_rate": 0.05,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
        }
        arguments = TrainingArguments(tmp_path / "run", **{**defaults, **options})
        model = model or tiny_model("mixtral", num_hidden_layers=2)
        return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2])

    return make


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "routing_probe/entropy" in entry]


def test_start_evaluations_and_end_are_logged_once_each(make_trainer, tiny_tokenizer):
    trainer = make_trainer(eval_strategy="steps", eval_steps=2)
    RoutingReportCallback(tiny_tokenizer, TEXTS).attach(trainer)
    trainer.train()
    entries = logged(trainer)
    assert [entry["step"] for entry in entries] == [0, 2, 4]
    for entry in entries:
        assert {key for key in entry if "/" in key} == {f"routing_probe/{key}" for key in KEYS}
    assert entries[0]["routing_probe/selection_shift"] == entries[0]["routing_probe/load_shift"] == 0
    assert entries[2]["routing_probe/selection_shift"] > 0


def test_every_so_many_steps_with_single_layers(make_trainer, tiny_tokenizer):
    trainer = make_trainer(tiny_model("mixtral"))
    RoutingReportCallback(tiny_tokenizer, TEXTS, every=3, per_layer=2).attach(trainer)
    trainer.train()
    assert [entry["step"] for entry in logged(trainer)] == [0, 3, 4]
    extra = {key for key in logged(trainer)[0] if "/layer_" in key}
    assert extra == {
        f"routing_probe/layer_{i}/{key}" for i in (0, 3) for key in ("load_shift", "max_violation", "selection_shift")
    }


@pytest.mark.parametrize("family", ["mixtral", "moe_llama"])
def test_values_are_those_of_the_reports(make_trainer, tiny_tokenizer, family):
    model = tiny_model(family, num_hidden_layers=2)
    before = routing_snapshot(model, tiny_tokenizer, TEXTS)
    trainer = make_trainer(model)
    callback = RoutingReportCallback(tiny_tokenizer, iter(TEXTS)).attach(trainer)
    trainer.train()
    report = routing_report(model, tiny_tokenizer, TEXTS)
    shift = routing_shift(before, routing_snapshot(model, tiny_tokenizer, TEXTS))
    last = logged(trainer)[-1]
    for key, value in {**shift.metrics(), "class_shift": report.metrics()["class_shift"]}.items():
        assert last[f"routing_probe/{key}"] == pytest.approx(value)
    assert last["routing_probe/entropy"] == pytest.approx(report.metrics()["routing_entropy"])
    assert callback.report.layers == report.layers
    assert callback.shift.layers == shift.layers


def test_every_logger_of_the_trainer_gets_the_values(make_trainer, tiny_tokenizer):
    class Logger(TrainerCallback):
        seen = ()

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen += tuple(key for key in logs if key.startswith("routing_probe/"))

    trainer, logger = make_trainer(), Logger()
    trainer.add_callback(logger)  # before the report: its place in the list makes no difference
    RoutingReportCallback(tiny_tokenizer, TEXTS).attach(trainer)
    trainer.train()
    assert logger.seen.count("routing_probe/entropy") == len(logged(trainer)) == 2


def test_training_is_not_changed_by_being_watched(make_trainer, tiny_tokenizer):
    def train(watch):
        trainer = make_trainer(tiny_model("mixtral", num_hidden_layers=2, attention_dropout=0.1))
        torch.manual_seed(0)
        if watch:
            RoutingReportCallback(tiny_tokenizer, TEXTS, every=1).attach(trainer)
        trainer.train_dataset = [{"input_ids": torch.arange(3, 15), "labels": torch.arange(3, 15)}] * 8
        trainer.train()
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.model.modules())
        return trainer.model.state_dict(), hooks

    (plain, hooks), (watched, watched_hooks) = train(False), train(True)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert hooks == watched_hooks


def test_files_are_written_below_the_output_folder_at_the_end(make_trainer, tiny_tokenizer, tmp_path):
    trainer = make_trainer()
    RoutingReportCallback(tiny_tokenizer, TEXTS, output_dir="routing").attach(trainer)
    trainer.train()
    folder = tmp_path / "run" / "routing"
    shift = json.loads((folder / "shift.json").read_text())
    assert shift["name_a"].endswith("step 0") and shift["name_b"].endswith("step 4")
    assert json.loads((folder / "report.json").read_text())["num_tokens"] == shift["tokens_b"]
    assert {"report.md", "shift.md", "routing_shift.png", "expert_load.png"} <= {
        path.name for path in folder.iterdir()
    }


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT 0.21
def test_a_peft_model_is_watched_through_its_wrapper(make_trainer, tiny_tokenizer):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model("mixtral", num_hidden_layers=2), peft.LoraConfig(target_modules=["q_proj"]))
    trainer = make_trainer(model)
    RoutingReportCallback(tiny_tokenizer, TEXTS).attach(trainer)
    trainer.train()
    assert len(logged(trainer)) == 2


def test_without_a_trainer_to_log_through_training_does_not_begin(make_trainer, tiny_tokenizer):
    trainer = make_trainer()
    trainer.add_callback(RoutingReportCallback(tiny_tokenizer, TEXTS))
    with pytest.raises(ValueError, match=r"has no Trainer to log through.*attach\(trainer\)"):
        trainer.train()


def test_a_dense_model_is_refused_when_training_begins(make_trainer, tiny_tokenizer, tiny_llama):
    trainer = make_trainer(tiny_llama)
    RoutingReportCallback(tiny_tokenizer, TEXTS).attach(trainer)
    with pytest.raises(ValueError, match="has no MoE layer"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "`every` must be 'evaluate' or a number of steps of at least 1, got 0"),
        ({"every": "epoch"}, "`every` must be 'evaluate' or a number of steps of at least 1, got 'epoch'"),
        ({"per_layer": -1}, "`per_layer` must be 0 or more, got -1"),
        ({"max_tokens": 0}, "`max_tokens` must be at least 1, got 0"),
        ({"texts": "one"}, "`texts` must be a list of texts, got a single one"),
    ],
)
def test_wrong_settings_are_refused_at_once(tiny_tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        RoutingReportCallback(tiny_tokenizer, **{"texts": TEXTS, **options})


def test_texts_without_tokens_are_refused(make_trainer, tiny_tokenizer):
    trainer = make_trainer()
    RoutingReportCallback(tiny_tokenizer, [""]).attach(trainer)
    with pytest.raises(ValueError, match="`texts` holds no token"):
        trainer.train()


def test_a_second_training_starts_a_new_comparison(make_trainer, tiny_tokenizer):
    trainer = make_trainer()
    RoutingReportCallback(tiny_tokenizer, TEXTS).attach(trainer)
    trainer.train()
    trainer.train()
    assert [entry["routing_probe/selection_shift"] for entry in logged(trainer) if entry["step"] == 0] == [0]
    assert hf_moe.moe_layers(trainer.model)
