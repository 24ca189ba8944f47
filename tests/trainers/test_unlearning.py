import json
import math

import peft
import pytest
import torch
from common.tiny_families import tiny_model
from common.tiny_training import arguments, third_party_warnings
from transformers import Trainer, TrainerCallback

from hf_moe import ExpertScores, ExpertSliceConfig, attribute_experts, moe_layers
from hf_moe.adapters.expert_slice import bypass_slices
from hf_moe.attribution import pad_token_rows
from hf_moe.trainers import ExpertUnlearningConfig, ExpertUnlearningTrainer
from hf_moe.trainers.unlearning_losses import token_cross_entropy
from hf_moe.views import unwrap_model


pytestmark = third_party_warnings

FAMILIES = ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "moe_llama", "moe_plus_plus")
LOSSES = ("ga", "graddiff", "npo", "rmu")


def rows(count, seed=0, length=8):
    """Rows of a few tokens of their own: two sets with different seeds are different topics."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = torch.randperm(380, generator=generator)[:12] + 3
    return [
        {"input_ids": vocabulary[torch.randint(12, (length,), generator=generator)].tolist()} for _ in range(count)
    ]


def build(folder, model=None, forget=None, retain=None, trainer=None, **options):
    options = {"learning_rate": 0.01, "max_steps": 2, **options}
    args = arguments(ExpertUnlearningConfig, folder, **options)
    model = tiny_model("mixtral") if model is None else model
    forget, retain = rows(4) if forget is None else forget, rows(6, seed=1) if retain is None else retain
    return ExpertUnlearningTrainer(model, args, forget, retain or None, **(trainer or {}))


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# -- what trains ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "loss"),
    [
        pytest.param(family, loss, marks=[] if family == "mixtral" or loss == "npo" else pytest.mark.slow)
        for family in FAMILIES
        for loss in LOSSES
    ],
)
def test_everything_but_slice_and_router_is_bit_identical(family, loss, tmp_path):
    model = tiny_model(family)
    before = state(model)
    trainer = build(tmp_path, model, forget_loss=loss, weight_decay=0.1)
    trainer.train()
    ((layer, (expert,)),) = trainer.targets.items()
    assert trainer.scores.best()[0][:2] == (layer, expert)
    after = state(trainer.model.merge_and_unload())
    assert after.keys() == before.keys()
    router = next(view for view in moe_layers(model) if view.name == layer).router
    routers = {id(parameter) for parameter in router.parameters()}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in routers}
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    bank = {name for name in changed if name.startswith(f"{layer}.experts.")}
    assert bank and changed - bank and changed - bank <= names
    for name in bank:
        others = [i for i in range(len(before[name])) if i != expert]
        assert torch.equal(before[name][others], after[name][others])


def test_routers_stay_where_they_are_not_to_train(tmp_path):
    model = tiny_model("mixtral")
    before = state(model)
    trainer = build(tmp_path, model, train_router=False)
    trainer.train()
    assert trainer.anchor is None
    after = state(trainer.model.merge_and_unload())
    assert {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])} == {
        "gate_up_proj",
        "down_proj",
    }


@pytest.mark.parametrize(("trainable", "kept"), [("all", set()), ("all_but_routers", {"gate.weight"})])
@pytest.mark.parametrize("loss", ["graddiff", "npo", "rmu"])
def test_whole_models_train_for_comparison(loss, trainable, kept, tmp_path):
    model = tiny_model("mixtral")
    before = state(model)
    trainer = build(tmp_path, model, forget_loss=loss, trainable=trainable, rmu_layer=3 if loss == "rmu" else None)
    trainer.train()
    after = state(trainer.model)
    same = {name for name in before if torch.equal(before[name], after[name])}
    head = {"model.norm.weight", "lm_head.weight"} if loss == "rmu" else set()
    assert {".".join(name.split(".")[-2:]) for name in same - head} == kept


def test_attribution_chooses_in_one_layer_or_over_all(tmp_path):
    scores = ExpertScores(
        {f"model.layers.{i}.mlp": [0.5 if i == 1 else 0.4, *[0.1 - e / 100 for e in range(7)]] for i in range(4)}, 1, 1
    )
    options = {"num_target_experts": 3, "trainer": {"scores": scores}}
    assert build(tmp_path, **options).targets == {"model.layers.1.mlp": [0, 1, 2]}
    apart = build(tmp_path, target_same_layer=False, **options).targets
    assert apart == {f"model.layers.{i}.mlp": [0] for i in (0, 1, 2)}
    trainer = build(tmp_path, target_experts='{"2": [3]}')
    assert trainer.targets == {"model.layers.2.mlp": [3]} and trainer.scores is None
    trainer = build(tmp_path, attribution_tokens=8, per_device_eval_batch_size=1)
    expected = attribute_experts(tiny_model("mixtral"), rows(4), 8, batch_size=1, show_progress=False)
    assert trainer.scores.layers == expected.layers and trainer.targets == expected.targets()
    trainer.train()
    assert ExpertScores.from_json(tmp_path / "expert_scores.json").layers == expected.layers


def test_an_adapter_that_is_there_is_trained_on(tmp_path):
    model = peft.get_peft_model(tiny_model("mixtral"), ExpertSliceConfig(layers={1: [4]}))
    trainer = build(tmp_path, model)
    assert trainer.model is model and trainer.targets == {"model.layers.1.mlp": [4]}
    trainer.train()


def test_several_targets_in_several_layers_train_together(tmp_path):
    model = tiny_model("mixtral")
    before = state(model)
    trainer = build(tmp_path, model, target_experts={"1": [0, 3], "3": [2]})
    trainer.train()
    after = state(trainer.model.merge_and_unload())
    for layer, experts in ((1, [0, 3]), (3, [2])):
        name = f"model.layers.{layer}.mlp.experts.down_proj"
        moved = [i for i in range(8) if not torch.equal(before[name][i], after[name][i])]
        assert moved and set(moved) <= set(experts)


# -- losses -----------------------------------------------------------------------------------------------------
def losses(trainer):
    return [log for log in trainer.state.log_history if "forget_term" in log]


@pytest.mark.parametrize("loss", LOSSES)
def test_logged_terms_add_up_to_the_loss(loss, tmp_path):
    trainer = build(tmp_path, forget_loss=loss, retain_weight=0.5, anchor_weight=2.0, logging_steps=1)
    trainer.train()
    for log in losses(trainer):
        total = log["forget_term"] + 0.5 * log["retain_term"] + 2.0 * log["anchor"]
        assert log["loss"] == pytest.approx(total, rel=1e-4)
    assert len(losses(trainer)) == 2


def test_first_step_is_what_the_formulas_say(tmp_path):
    forget, retain = rows(2), rows(2, seed=1)
    values = {}
    for loss in LOSSES:
        trainer = build(tmp_path, forget=forget, retain=retain, forget_loss=loss, max_steps=1)
        trainer.train()
        values[loss] = losses(trainer)[0]
    model = tiny_model("mixtral")
    entropies = {}
    for name, data in (("forget", forget), ("retain", retain)):
        batch = pad_token_rows(data)
        with torch.no_grad():
            entropies[name] = token_cross_entropy(model(input_ids=batch["input_ids"])[0], batch["labels"]).item()
    assert values["ga"]["forget_term"] == pytest.approx(-entropies["forget"], rel=1e-5)
    assert "retain_term" not in values["ga"]
    assert values["graddiff"]["retain_term"] == pytest.approx(entropies["retain"], rel=1e-5)
    assert values["npo"]["forget_term"] == pytest.approx(2 / 0.001 * math.log(2), rel=1e-5)
    assert values["rmu"]["retain_term"] == 0 and values["rmu"]["forget_term"] > 0


def test_reference_is_the_model_at_the_start_without_a_copy(tmp_path):
    model = tiny_model("mixtral")
    ids = torch.tensor([rows(1)[0]["input_ids"]])
    with torch.no_grad():
        expected = model(input_ids=ids)[0]
    trainer = build(tmp_path, model, forget_loss="npo")
    trainer.train()
    with trainer.reference() as reference:
        assert torch.equal(reference(input_ids=ids)[0], expected)
        assert trainer._reference_model is None
    with torch.no_grad():
        assert not torch.equal(trainer.model(input_ids=ids)[0], expected)


def test_steering_brings_hidden_states_to_the_vector(tmp_path):
    trainer = build(tmp_path, forget_loss="rmu", max_steps=30, retain_weight=0, anchor_weight=0, rmu_steering=2.0)
    assert trainer.steering.path == next(iter(trainer.targets)).removesuffix(".mlp")
    assert trainer.steering.vector.norm().item() == pytest.approx(2.0)
    trainer.train()
    assert losses(trainer)[-1]["forget_term"] < losses(trainer)[0]["forget_term"]


def test_a_loss_of_ones_own_is_used(tmp_path):
    seen = []

    def own(step):
        seen.append((step.forget["input_ids"].shape, step.retain_loss.item()))
        return (step.forget_loss - 9.0).square()

    trainer = build(tmp_path, trainer={"forget_loss": own}, anchor_weight=0)
    trainer.train()
    assert len(seen) == 2 and losses(trainer)[0]["loss"] == losses(trainer)[0]["forget_term"] > 0
    pair = build(tmp_path, trainer={"forget_loss": lambda s: (-s.forget_loss, s.retain_loss)}, retain_weight=3.0)
    pair.train()
    assert "retain_term" in losses(pair)[0]


def test_the_anchor_keeps_the_router_on_the_target(tmp_path):
    weights = {}
    for alpha in (0.0, 100.0):
        options = {"max_steps": 20, "learning_rate": 0.02, "target_experts": {"2": [5]}}
        trainer = build(tmp_path, anchor_weight=alpha, **options)
        trainer.train()
        model = trainer.model.merge_and_unload()
        weights[alpha] = attribute_experts(model, rows(4), show_progress=False).layers["model.layers.2.mlp"][5]
    assert weights[100.0] > weights[0.0] + 0.2


def gradients(trainer):
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "moe_plus_plus"])
def test_gradients_are_the_same_with_checkpointing(family, tmp_path):
    plain = build(tmp_path, tiny_model(family), anchor_weight=10.0)
    checkpointed = build(tmp_path, tiny_model(family), anchor_weight=10.0)
    unwrap_model(checkpointed.model).activation_checkpointing_enable()
    expected, got = gradients(plain), gradients(checkpointed)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_checkpointing_in_training(tmp_path):
    results = []
    for options in ({}, {"activation_checkpointing": True}):
        trainer = build(tmp_path, **options)
        trainer.train()
        results.append(losses(trainer))
    assert [log["loss"] for log in results[0]] == [log["loss"] for log in results[1]]


@pytest.mark.parametrize("family", ["mixtral", "moe_llama"])
def test_the_models_own_router_losses_play_no_part(family, tmp_path):
    found = []
    for coefficient in (0.0, 50.0):
        model = tiny_model(family, router_aux_loss_coef=coefficient, output_router_logits=True)
        found.append(gradients(build(tmp_path, model, forget_loss="graddiff")))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_accumulated_micro_batches_make_the_same_step(tmp_path):
    after = []
    for options in ({"per_device_train_batch_size": 4}, {"gradient_accumulation_steps": 2}):
        trainer = build(tmp_path, forget_loss="graddiff", max_steps=1, optim="sgd", **options)
        trainer.train()
        after.append(trainer.model.state_dict())
    for name, value in after[0].items():
        torch.testing.assert_close(after[1][name], value, rtol=1e-4, atol=1e-6)


def test_top_one_models_are_anchored_by_their_probabilities(tmp_path):
    top_one = {"num_experts_per_tok": 1}
    assert build(tmp_path).anchor.on == "weights"
    trainer = build(tmp_path, tiny_model("mixtral", **top_one))
    assert trainer.anchor.on == "probs"
    trainer.train()
    assert build(tmp_path, tiny_model("deepseek_v2", **top_one)).anchor.on == "weights"  # not renormalised


# -- evaluation -------------------------------------------------------------------------------------------------
def test_evaluation_reports_forgetting_and_utility(tmp_path):
    model = tiny_model("mixtral")
    sets = {"one": rows(3, seed=1), "two": rows(5, seed=2)}
    extra = {"eval_retain_dataset": sets, "compute_utility": lambda model: {"accuracy": 0.25}}
    trainer = build(tmp_path, model, trainer=extra, forget_loss_target=30.0, max_steps=6)
    start = trainer.evaluate()
    assert (start["eval_forgetting"], start["eval_utility"], start["eval_balance"]) == (0, 1, 0)
    batch = pad_token_rows(sets["two"])
    with torch.no_grad(), bypass_slices(model):
        expected = token_cross_entropy(model(input_ids=batch["input_ids"])[0], batch["labels"]).item()
    assert start["eval_retain_two_loss"] == pytest.approx(expected, rel=1e-5)
    mean = (start["eval_retain_one_loss"] + start["eval_retain_two_loss"]) / 2
    assert start["eval_retain_loss"] == pytest.approx(mean)
    assert start["eval_forget_perplexity"] == pytest.approx(math.exp(start["eval_forget_loss"]))
    assert start["eval_accuracy"] == 0.25
    trainer.train()
    end = trainer.evaluate(metric_key_prefix="test")
    forgotten = (end["test_forget_loss"] - start["eval_forget_loss"]) / (30.0 - start["eval_forget_loss"])
    assert 0 < end["test_forgetting"] == pytest.approx(forgotten)
    with pytest.raises(ValueError, match="`eval_dataset` cannot be given"):
        trainer.evaluate(rows(2))


@pytest.mark.parametrize("trainable", ["expert", "all"])
def test_the_best_checkpoint_is_kept_and_loaded(trainable, tmp_path):
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    options |= {"load_best_model_at_end": True, "learning_rate": 0.05, "max_steps": 4, "forget_loss_target": 8.0}
    trainer = build(tmp_path, trainable=trainable, **options)
    trainer.train()
    balances = [log["eval_balance"] for log in trainer.state.log_history if "eval_balance" in log]
    assert trainer.args.metric_for_best_model == "balance" and max(balances) > 0
    assert trainer.state.best_metric == max(balances)
    assert trainer.evaluate()["eval_balance"] == pytest.approx(max(balances), rel=1e-4)


@pytest.mark.parametrize("trainable", ["expert", "all"])
def test_a_resumed_run_equals_an_uninterrupted_one(trainable, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "trainable": trainable}
    whole = build(tmp_path / "whole", forget_loss="graddiff", **options)
    whole.train()
    resumed = build(tmp_path / "resumed", forget_loss="graddiff", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


def test_what_is_saved_is_the_adapter(tmp_path):
    trainer = build(tmp_path)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "HFMOE_EXPERT_SLICE"
    again = peft.PeftModel.from_pretrained(tiny_model("mixtral"), tmp_path / "adapter")
    ids = torch.tensor([rows(1)[0]["input_ids"]])
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids)[0], trainer.model.eval()(input_ids=ids)[0])


# -- bad input --------------------------------------------------------------------------------------------------
PADDING = [{"input_ids": [0, 0], "attention_mask": [0, 0]}] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forget": []}, "`forget_dataset` is empty"),
        ({"forget": PADDING}, "nothing but padding"),
        ({"forget_loss": "npo", "retain": ()}, "`retain_dataset` is missing"),
        ({"num_target_experts": 9}, r"`num_target_experts` must be at most the number of experts in a layer \(8\)"),
        ({"num_target_experts": 33, "target_same_layer": False}, r"experts in all layers \(32\), got 33"),
        ({"target_experts": {"1": [8]}}, r"has the experts \[8\]"),
        ({"target_experts": {"model.norm": [0]}}, "which has no routed experts"),
        ({"model": {"num_experts_per_tok": 1}, "anchor_on": "weights"}, "`anchor_on='weights'` has gradient 0"),
        ({"forget_loss": "rmu", "rmu_layer": 4}, "`rmu_layer` must be from 0 to 3, got 4"),
        ({"trainer": {"callbacks": [3]}}, None),  # fails after the adapter was put in
    ],
)
def test_bad_input_is_refused_and_the_model_is_as_it_was(options, message, tmp_path):
    options = dict(options)
    model = tiny_model("mixtral", **options.pop("model", {}))
    model.model.norm.weight.requires_grad_(False)
    before = state(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    types, count = [type(m) for m in model.modules()], hooks(model)
    with pytest.raises(ValueError if message else Exception, match=message):
        build(tmp_path, model, **options)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert [type(m) for m in model.modules()] == types and hooks(model) == count
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forget_loss": "dpo"}, "`forget_loss` must be one of 'ga', 'graddiff', 'npo', 'rmu', got 'dpo'"),
        ({"anchor_on": "logits"}, "`anchor_on` must be one of"),
        ({"trainable": "mask"}, "`trainable` must be one of"),
        ({"npo_beta": 0.0}, "`npo_beta` must be positive"),
        ({"retain_weight": -1.0}, "`retain_weight` must not be negative"),
        ({"trainable": "all", "anchor_weight": 1.0}, "`anchor_weight` needs `trainable='expert'`"),
        ({"train_router": False, "anchor_weight": 1.0}, "`anchor_weight` has no gradient with `train_router=False`"),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
            "would silently drop the anchor's gradient",
        ),
        ({"remove_unused_columns": True}, "`remove_unused_columns` must be one of False"),
    ],
)
def test_arguments_that_contradict_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(ExpertUnlearningConfig, tmp_path, **options)


def test_a_dense_model_is_refused(tiny_llama, tmp_path):
    for trainable in ("expert", "all", "all_but_routers"):
        with pytest.raises(ValueError, match="has no MoE layer"):
            build(tmp_path, tiny_llama, trainable=trainable)
    assert all(parameter.requires_grad for parameter in tiny_llama.parameters())
    with pytest.raises(ValueError, match="`forget_dataset` is missing"):
        ExpertUnlearningTrainer(tiny_llama, arguments(ExpertUnlearningConfig, tmp_path))


def test_another_adapter_is_refused(tmp_path):
    model = peft.get_peft_model(tiny_model("mixtral"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has an adapter of another type active"):
        build(tmp_path, model)


def test_a_batch_of_padding_is_refused_in_training(tmp_path):
    trainer = build(tmp_path, forget=[*rows(2), *PADDING], target_experts={"1": [0]}, num_train_epochs=2, max_steps=-1)
    with pytest.raises(ValueError, match="A forget batch is nothing but padding"):
        for seed in range(20):
            trainer.args.seed = seed
            trainer.train()


def test_hooks_go_when_training_fails(tmp_path):
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("stop")

    trainer = build(tmp_path, trainer={"callbacks": [Fail()]})
    count = hooks(trainer.model)
    with pytest.raises(RuntimeError, match="stop"):
        trainer.train()
    assert hooks(trainer.model) == count and not trainer.anchor._attached


def test_it_is_a_trainer_like_others():
    assert issubclass(ExpertUnlearningTrainer, Trainer)
    assert "UnlearningStep" in dir(__import__("hf_moe.trainers", fromlist=["_"]))
