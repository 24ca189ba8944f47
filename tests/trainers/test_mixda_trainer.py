"""Both stages of MixDA on tiny encoders and decoders."""

import pytest
import torch
from common.mixda_models import IDS, MASK, perturb, tiny
from common.tiny_training import third_party_warnings
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from hf_moe import MixdaConfig
from hf_moe.adapters.mixda import MixdaLayer
from hf_moe.trainers import MixdaTrainer, MixdaTrainingArguments


pytestmark = third_party_warnings
HEADS = {"bert": "masked", "roberta": "masked", "llama": "causal", "gpt2": "causal"}


def rows(count, seed=0, labels=None, length=6):
    """Tokenised rows; labels are the tokens themselves, or a class."""
    ids = torch.randint(3, 64, (count, length), generator=torch.Generator().manual_seed(seed))
    made = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    for row in made:
        if labels is not None:
            row["labels"] = row["input_ids"] if labels == "tokens" else torch.tensor(int(row["input_ids"][0]) % labels)
    return made


def stack(batch):
    return {name: torch.stack([torch.as_tensor(row[name]) for row in batch]) for name in batch[0]}


def adapted(family="bert", **fields):
    base = tiny(family)
    torch.manual_seed(0)
    return get_peft_model(base, MixdaConfig(**({"domain_layers": [0, 1], "reduction": 8} | fields)))


def trainer_of(model, folder, data=None, general=None, trainer=None, **options):
    settings = {
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 2, "per_device_train_batch_size": 2,
        "save_strategy": "no", "logging_steps": 1, "max_grad_norm": 0.0, "dataloader_pin_memory": False,
    }  # fmt: skip
    args = MixdaTrainingArguments(str(folder), **(settings | options))
    data = rows(8, labels="tokens") if data is None else data
    kwargs = {"data_collator": stack} | (trainer or {})
    if general is not None:
        kwargs |= {"general_dataset": general, "general_collator": stack}
    return MixdaTrainer(model, args, train_dataset=data, **kwargs)


def containers(names):
    return {name.split("hfmoe_mixda_")[1].split(".")[0] if "hfmoe" in name else "head" for name in names}


def manual_loss(model, domain, general, weight=0.5, reduction="mean"):
    """lambda * L_K + L_S, written out: hooks on the base modules, one loss per layer."""
    knowledge = model.eval()(**domain).loss
    seen = {}
    layers = [module for module in model.modules() if isinstance(module, MixdaLayer)]
    handles = [
        layer.base_layer.register_forward_hook(lambda m, args, out, layer=layer: seen.update({layer: (args[0], out)}))
        for layer in layers
    ]
    with torch.no_grad():
        model(**general)
    for handle in handles:
        handle.remove()
    losses = []
    for layer in layers:
        x, output = seen[layer]
        square = (output - layer.cell("expert", "default")["domain"](x)).square()
        losses.append(square.sum() if reduction == "sum" else square.mean())
    return knowledge, torch.stack(losses).mean(), weight * knowledge + torch.stack(losses).mean()


@pytest.mark.parametrize("family", list(HEADS))
def test_the_loss_is_the_weighted_sum_and_its_gradients_are_those(family, tmp_path):
    model = perturb(adapted(family))
    general = rows(4, seed=5)
    trainer = trainer_of(model, tmp_path, general=general, lambda_knowledge=0.3, general_batch_size=4)
    domain = stack(rows(2, seed=6, labels="tokens"))
    for module in model.modules():  # as the comparison: without dropout
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    everything = stack([general[trainer._general.index(i)] for i in range(4)])
    knowledge, sampling, expected = manual_loss(model, domain, everything, 0.3)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(model.train(), domain)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, wanted)
    assert containers(wanted) == {"expert", "gate"} and sampling > 0
    assert model.training
    evaluated = trainer.compute_loss(model.eval(), domain)
    torch.testing.assert_close(evaluated, knowledge)  # nothing is added to an evaluation


def test_known_figures_add_up(tmp_path):
    knowledge = -torch.tensor([0.5, 0.25]).log().mean()
    assert knowledge.item() == pytest.approx(1.03972, abs=1e-5)
    trainer = trainer_of(adapted(), tmp_path, general=rows(2))
    trainer.current_gradient_accumulation_steps = 1
    trainer._sampling_loss = lambda model, general: torch.tensor(2.0)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: knowledge
    assert trainer.compute_loss(trainer.model.train(), stack(rows(2, labels="tokens"))).item() == pytest.approx(
        2.51986, abs=1e-5
    )


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_first_stage_trains_domain_adapter_and_gate_and_learns_both(family, tmp_path):
    model = adapted(family, reduction=1)
    with torch.no_grad():  # random networks of this size give next to nothing
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "hfmoe" not in name and ("intermediate" in name or "mlp" in name):
                parameter.mul_(15.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_of(
        model, tmp_path, general=rows(4, seed=5), max_steps=40, learning_rate=0.01, gate_learning_rate=0.01,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "sampling_loss" in entry]
    assert len(logs) == 40
    for entry in logs:
        assert entry["loss"] == pytest.approx(0.5 * entry["knowledge_loss"] + entry["sampling_loss"], rel=1e-4)
    assert logs[-1]["sampling_loss"] < 0.5 * logs[0]["sampling_loss"]
    assert sum(e["knowledge_loss"] for e in logs[-4:]) < sum(e["knowledge_loss"] for e in logs[:4])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert containers(changed) == {"expert", "gate"}


def test_the_second_stage_is_the_models_loss_and_leaves_domains_alone(tmp_path):
    model = adapted("bert_labels", stage="task", task_reduction=4, task_type="SEQ_CLS")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_of(model, tmp_path, data=rows(8, labels=3), learning_rate=0.01, max_steps=3)
    domain = stack(rows(2, labels=3))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(trainer.compute_loss(model.train(), domain), model(**domain).loss)
    trainer.train()
    assert not any("sampling_loss" in entry for entry in trainer.state.log_history)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert containers(changed) == {"gate", "task", "head"}
    with pytest.raises(ValueError, match=r"`general_dataset` is for `stage='knowledge'`"):
        trainer_of(model, tmp_path, data=rows(8, labels=3), general=rows(2))


def test_a_short_general_text_does_not_shorten_the_epoch(tmp_path):
    trainer = trainer_of(adapted(), tmp_path, general=rows(1), max_steps=-1, num_train_epochs=1)
    trainer.train()
    assert trainer.state.global_step == 4


def test_accumulated_micro_batches_give_the_step_of_one_batch(tmp_path):
    found = []
    for size, steps in ((4, 1), (2, 2)):
        model = perturb(adapted("llama"))
        trainer = trainer_of(
            model, tmp_path, data=rows(4, labels="tokens"), general=rows(4, seed=5), max_steps=1,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps, optim="sgd", learning_rate=1.0,
            weight_decay=0.0,
        )  # fmt: skip
        trainer.train()
        found.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        logged = trainer.state.log_history[0]
        assert logged["loss"] == pytest.approx(0.5 * logged["knowledge_loss"] + logged["sampling_loss"], rel=1e-4)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_checkpointing_changes_nothing(pooling, reentrant, tmp_path):
    found = []
    for checkpointing in (False, True):
        model = perturb(adapted("bert", gate_pooling=pooling))
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.enable_input_require_grads()
        trainer = trainer_of(
            model, tmp_path, general=rows(4, seed=5), activation_checkpointing=checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": reentrant}, max_steps=3, learning_rate=0.01,
        )  # fmt: skip
        trainer.train()
        found.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*found)


def test_gates_have_a_learning_rate_of_their_own(tmp_path):
    trainer = trainer_of(adapted(), tmp_path, general=rows(2), learning_rate=0.1, gate_learning_rate=0.3)
    optimizer = trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: rates[id(p)] for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {rate for name, rate in named.items() if "_gate." in name} == {0.3}
    assert {rate for name, rate in named.items() if "_expert." in name} == {0.1}
    decays = {name: g["weight_decay"] for g in optimizer.param_groups for name, p in
              trainer.model.named_parameters() if any(p is q for q in g["params"])}  # fmt: skip
    assert {v for n, v in decays.items() if n.endswith("bias")} == {0.0}
    assert {v for n, v in decays.items() if n.endswith("weight")} == {0.05}
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path):
    options = {
        "max_steps": 4,
        "learning_rate": 0.01,
        "save_strategy": "steps",
        "save_steps": 2,
        "dataloader_num_workers": 0,
    }
    whole = perturb(adapted())
    trainer_of(whole, tmp_path / "a", general=rows(5, seed=5), **options).train()
    again = perturb(adapted())
    trainer = trainer_of(again, tmp_path / "a", general=rows(5, seed=5), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    expected = {name: p for name, p in whole.named_parameters() if p.requires_grad}
    torch.testing.assert_close({name: p for name, p in again.named_parameters() if p.requires_grad}, expected)


def test_text_and_prompts_need_no_collator(tmp_path, tiny_tokenizer):
    for data in (
        [{"text": "The river runs past the old mill.", "more": "x"}] * 4,
        [{"prompt": "The river runs past the {}.", "targets": ["old mill"]}] * 4,
    ):
        torch.manual_seed(0)
        from transformers import LlamaConfig, LlamaForCausalLM

        base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tiny_tokenizer), hidden_size=16, intermediate_size=32,
                                            num_hidden_layers=2, num_attention_heads=2))  # fmt: skip
        model = get_peft_model(base, MixdaConfig())
        trainer = trainer_of(
            model, tmp_path, data=data, trainer={
                "data_collator": None, "processing_class": tiny_tokenizer,
                "general_dataset": [{"text": "Experts specialise."}],
            }, max_length=16,
        )  # fmt: skip
        trainer.train()
        assert trainer.state.log_history[0]["knowledge_loss"] > 0


def test_a_data_set_keeps_the_columns_that_collators_read(tmp_path, tiny_tokenizer):
    from datasets import Dataset

    data = Dataset.from_list([{"text": "The river runs past the old mill.", "topic": "rivers"}] * 4)
    base = tiny("gpt2")
    base.resize_token_embeddings(len(tiny_tokenizer))
    trainer = trainer_of(
        get_peft_model(base, MixdaConfig()), tmp_path, data=data,
        trainer={"data_collator": None, "processing_class": tiny_tokenizer, "general_dataset": data},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 2


def test_models_and_arguments_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no active MixDA adapter"):
        trainer_of(get_peft_model(tiny("bert"), LoraConfig(target_modules=["query"])), tmp_path)
    with pytest.raises(ValueError, match="has no domain in use"):
        trainer_of(get_peft_model(tiny("bert"), MixdaConfig(domains=[], task_reduction=4)), tmp_path)
    with pytest.raises(TypeError, match="`args` must be MixdaTrainingArguments"):
        MixdaTrainer(adapted(), TrainingArguments(str(tmp_path)))
    with pytest.raises(ValueError, match="`model` must be given"):
        MixdaTrainer(args=MixdaTrainingArguments(str(tmp_path)))
    with pytest.raises(ValueError, match="`general_collator` or `processing_class`"):
        trainer_of(adapted(), tmp_path, trainer={"general_dataset": rows(2)})
    for name, value in (
        ("lambda_knowledge", -1.0), ("sampling_reduction", "max"), ("general_batch_size", 0), ("max_length", 0),
        ("gate_learning_rate", -1.0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"`{name}`"):
            MixdaTrainingArguments(str(tmp_path), **{name: value})


def test_an_adapter_of_transformers_own_integration_trains_too(tmp_path):
    model = tiny("bert")
    model.add_adapter(MixdaConfig(domain_layers=[0, 1]), adapter_name="biology")
    trainer = trainer_of(model, tmp_path, general=rows(4, seed=5))
    trainer.train()
    assert trainer.state.log_history[0]["sampling_loss"] > 0


def test_left_padding_and_masks_reach_the_sampling_loss(tmp_path):
    model = perturb(adapted())
    padded = [{"input_ids": IDS[1], "attention_mask": MASK[1]}]
    short = [{"input_ids": IDS[1, :3], "attention_mask": MASK[1, :3]}]
    found = []
    for general in (padded, short):
        trainer = trainer_of(model, tmp_path, general=general, general_batch_size=1)
        found.append(trainer._sampling_loss(model.train(), trainer._general))
    torch.testing.assert_close(*found)
