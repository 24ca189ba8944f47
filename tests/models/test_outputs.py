"""What every model type returns, and what its loss is made of."""

import pytest
import torch
from common.model_battery import HEADS, TYPES, VOCABULARY, make_config, make_inputs, make_model
from torch.nn import functional as F

from hf_moe.layers import MoeBlock
from hf_moe.routing.balance import expert_frequency, load_balance_loss, router_z_loss


every_type = pytest.mark.parametrize("model_type", TYPES)
every_head = pytest.mark.parametrize("head", HEADS)
B, S, T = 2, 8, 16
LABELS = {
    "ForCausalLM": lambda ids: ids,
    "ForSequenceClassification": lambda ids: ids[:, 0] % 3,
    "ForTokenClassification": lambda ids: ids % 3,
}
with_loss = pytest.mark.parametrize("head", LABELS)


def labels_for(head, inputs):
    labels = LABELS[head](inputs["input_ids"]).clone()
    if labels.dim() == 2:
        labels[inputs["attention_mask"] == 0] = -100
    return labels


def balance(model, outputs, mask=None):
    """The balance loss of the definition, a mean over layers, from what was returned."""
    routers = [block.gate for _, block in model.moe_blocks()]
    logits = outputs.get("all_router_logits") or outputs.router_logits
    values = []
    for router, layer_logits, index in zip(routers, logits, outputs.router_indices, strict=True):
        frequency = expert_frequency(index, router.num_experts, mask)
        p = router.probabilities(layer_logits)
        values.append(load_balance_loss(p, frequency, mask, router.balance_weights))
    return torch.stack(values).mean()


# -- shapes ----------------------------------------------------------------------------------------------------------
@every_type
@every_head
def test_forward_has_the_shapes_of_the_contract(model_type, head):
    model = make_model(model_type, head, num_labels=3)
    config = model.config
    outputs = model(**make_inputs(padding="right"), output_router_logits=True, output_hidden_states=True)
    if head == "Model":
        assert outputs.last_hidden_state.shape == (B, S, 32)
        assert all(logits.shape == (T, config.num_routing_targets) for logits in outputs.all_router_logits)
        # TRL computes its own loss from these and knows of feed-forward experts only.
        assert all(logits.shape == (T, config.num_experts) for logits in outputs.router_logits)
    else:
        expected = {
            "ForCausalLM": (B, S, VOCABULARY),
            "ForSequenceClassification": (B, 3),
            "ForTokenClassification": (B, S, 3),
        }
        assert outputs.logits.shape == expected[head]
        assert all(logits.shape == (T, config.num_routing_targets) for logits in outputs.router_logits)
        assert outputs.aux_loss.shape == () and outputs.loss is None
    assert len(outputs.router_logits) == len(outputs.router_indices) == 2
    slots = model.moe_blocks()[0][1].gate.num_slots
    for logits, index in zip(outputs.router_logits, outputs.router_indices, strict=True):
        assert logits.dtype == torch.float32 and index.dtype == torch.int64
        assert index.shape == (T, slots) and index.max() <= config.num_routing_targets
    assert len(outputs.hidden_states) == 3
    assert all(isinstance(state, torch.Tensor) and state.shape == (B, S, 32) for state in outputs.hidden_states)


@every_type
@every_head
def test_nothing_is_recorded_at_evaluation_unless_asked_for(model_type, head):
    model = make_model(model_type, head)
    outputs = model(**make_inputs())
    for key in ("router_logits", "router_indices", "aux_loss", "all_router_logits", "hidden_states", "attentions"):
        assert outputs.get(key) is None, key
    model.config.output_router_logits = True
    outputs = model(**make_inputs())
    assert len(outputs.router_logits) == 2 and len(outputs.router_indices) == 2
    assert model(**make_inputs(), output_router_logits=False).get("router_logits") is None


@every_type
@every_head
def test_tuples_hold_the_same_as_outputs(model_type, head):
    model = make_model(model_type, head)
    outputs = model(**make_inputs(), output_router_logits=True, use_cache=False)
    values = model(**make_inputs(), output_router_logits=True, use_cache=False, return_dict=False)
    assert isinstance(values, tuple) and len(values) == len(outputs.to_tuple())
    first = outputs.to_tuple()[0]
    torch.testing.assert_close(values[0], first)


@every_type
def test_hidden_states_are_what_the_layers_returned(model_type):
    model = make_model(model_type, "Model", num_hidden_layers=3, moe_layers=[0, 2])
    seen = []
    layers = getattr(model, model.layers_attribute)
    for layer in layers:
        layer.register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    outputs = model(**make_inputs(), output_hidden_states=True)
    for state, recorded in zip(seen[:-1], outputs.hidden_states[1:-1], strict=True):
        assert torch.equal(state, recorded)
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)


@every_type
def test_attentions_are_recorded_under_eager_attention(model_type):
    model = make_model(model_type, implementation={"attn_implementation": "eager"})
    outputs = model(**make_inputs(), output_attentions=True, output_router_logits=True)
    assert len(outputs.attentions) == 2
    assert all(attention.shape == (B, 4, S, S) for attention in outputs.attentions)
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(B, 4, S))


# -- losses ----------------------------------------------------------------------------------------------------------
@every_type
@with_loss
@pytest.mark.parametrize("padding", [None, "right"])
def test_loss_is_the_heads_plus_coefficient_times_balance(model_type, head, padding):
    model = make_model(model_type, head, num_labels=3, router_aux_loss_coef=0.5, expert_capacity_factor=None).train()
    inputs = make_inputs(padding=padding)
    labels = labels_for(head, inputs)
    outputs = model(**inputs, labels=labels)
    if head == "ForCausalLM":
        own = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    elif head == "ForSequenceClassification":
        own = F.cross_entropy(outputs.logits, labels)
    else:
        own = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
    expected = balance(model, outputs, inputs["attention_mask"].flatten().bool())
    torch.testing.assert_close(outputs.aux_loss, expected)
    torch.testing.assert_close(outputs.loss, own + 0.5 * expected)
    assert expected > 0.1  # so that the coefficient shows


@every_type
@every_head
def test_the_balance_loss_is_there_without_labels(model_type, head):
    model = make_model(model_type, head, expert_capacity_factor=None)
    for training in (False, True):
        outputs = model.train(training)(**make_inputs(), output_router_logits=True)
        if head == "Model":
            assert "aux_loss" not in outputs  # heads compute it; the base model gives what it takes
            continue
        torch.testing.assert_close(outputs.aux_loss, balance(model, outputs))
        assert outputs.loss is None


@every_type
@with_loss
def test_balance_gradients_reach_every_router_and_nothing_else_of_a_layer(model_type, head):
    model = make_model(model_type, head, num_labels=3, router_aux_loss_coef=1.0).train()
    inputs = make_inputs()
    outputs = model(**inputs, labels=labels_for(head, inputs))
    names = [name for name, _ in model.named_parameters() if ".gate." in name]
    gates = [dict(model.named_parameters())[name] for name in names]
    for name, gradient in zip(names, torch.autograd.grad(outputs.aux_loss, gates, retain_graph=True), strict=True):
        assert gradient.any(), name
    last = [p for name, p in model.named_parameters() if ".1.mlp.experts." in name]
    assert last and all(g is None for g in torch.autograd.grad(outputs.aux_loss, last, allow_unused=True))


@every_type
def test_coefficient_zero_and_evaluation_leave_the_loss_alone(model_type):
    inputs = make_inputs()
    losses = {}
    for coefficient in (0.0, 0.5):
        model = make_model(model_type, router_aux_loss_coef=coefficient, expert_capacity_factor=None)
        for training in (False, True):
            outputs = model.train(training)(**inputs, labels=inputs["input_ids"])
            losses[coefficient, training] = outputs.loss.item()
            assert (outputs.aux_loss is not None) == (training and coefficient > 0)
    assert losses[0.0, False] == losses[0.0, True] == losses[0.5, False] < losses[0.5, True]


@every_type
def test_labels_at_evaluation_add_the_balance_loss_only_where_it_was_asked_for(model_type):
    model, inputs = make_model(model_type, router_aux_loss_coef=0.5), make_inputs()
    plain = model(**inputs, labels=inputs["input_ids"])
    asked = model(**inputs, labels=inputs["input_ids"], output_router_logits=True)
    torch.testing.assert_close(asked.loss, plain.loss + 0.5 * asked.aux_loss)  # as in-tree MoE models do


@every_type
def test_the_z_loss_is_added_with_its_own_coefficient(model_type):
    model = make_model(model_type, router_aux_loss_coef=0.0, router_z_loss_coef=0.3).train()
    inputs = make_inputs()
    outputs = model(**inputs, labels=inputs["input_ids"])
    own = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
    z = torch.stack([router_z_loss(logits) for logits in outputs.router_logits]).mean()
    torch.testing.assert_close(outputs.loss, own + 0.3 * z)


@every_type
def test_coefficients_changed_on_a_built_model_count(model_type):
    model, inputs = make_model(model_type, router_aux_loss_coef=0.0).train(), make_inputs()
    plain = model(**inputs, labels=inputs["input_ids"]).loss
    model.config.router_z_loss_coef, model.config.router_aux_loss_coef = 0.3, 0.5
    outputs = model(**inputs, labels=inputs["input_ids"])
    z = torch.stack([router_z_loss(logits) for logits in outputs.router_logits]).mean()
    torch.testing.assert_close(outputs.loss, plain + 0.3 * z + 0.5 * outputs.aux_loss)


@every_type
def test_num_items_in_batch_normalises_the_cross_entropy(model_type):
    model, inputs = make_model(model_type), make_inputs()
    labels = inputs["input_ids"]
    mean = model(**inputs, labels=labels).loss
    summed = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(7 * B * 10)).loss
    torch.testing.assert_close(summed * 10, mean)


@every_type
def test_shifted_labels_are_taken_as_they_are(model_type):
    model, inputs = make_model(model_type), make_inputs()
    labels = inputs["input_ids"]
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    expected = model(**inputs, labels=labels).loss
    torch.testing.assert_close(model(**inputs, labels=labels, shift_labels=shifted).loss, expected)


@every_type
@with_loss
def test_a_trainer_predicts_logits_also_where_routing_is_recorded(model_type, head, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = make_model(model_type, head, num_labels=3, output_router_logits=True)
    inputs = make_inputs(batch=3)
    rows = [{key: value[i] for key, value in inputs.items()} for i in range(3)]
    for row, label in zip(rows, labels_for(head, inputs), strict=True):
        row["labels"] = label
    arguments = TrainingArguments(tmp_path, per_device_eval_batch_size=2, report_to="none", use_cpu=True)
    predictions = Trainer(model, arguments).predict(rows).predictions
    torch.testing.assert_close(torch.from_numpy(predictions), model(**inputs).logits, rtol=1e-4, atol=1e-5)


# -- arguments -------------------------------------------------------------------------------------------------------
@every_type
@every_head
def test_embeddings_may_replace_token_ids(model_type, head):
    model = make_model(model_type, head, num_labels=3, pad_token_id=None)
    inputs = make_inputs(batch=1)
    expected = model(**inputs)
    embedded = model(
        inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]), attention_mask=inputs["attention_mask"]
    )
    torch.testing.assert_close(embedded[0], expected[0])


@every_type
def test_only_the_last_logits_are_computed_where_asked_for(model_type):
    model, inputs = make_model(model_type), make_inputs()
    expected = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, logits_to_keep=1).logits, expected[:, -1:])
    keep = torch.tensor([2, 5])
    torch.testing.assert_close(model(**inputs, logits_to_keep=keep).logits, expected[:, keep])


@every_type
def test_sequences_are_classified_at_their_last_real_token(model_type):
    model = make_model(model_type, "ForSequenceClassification", num_labels=3)
    inputs = make_inputs(padding="right")
    short = model(input_ids=inputs["input_ids"][:1, :-3]).logits
    torch.testing.assert_close(model(**inputs).logits[:1], short)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match=r"`config.pad_token_id` is None"):
        model(**inputs)


# -- which layers are MoE layers -------------------------------------------------------------------------------------
@every_type
@pytest.mark.parametrize(
    ("moe_layers", "expected"),
    [("all", [0, 1, 2]), ("every:2", [1]), ([0, 2], [0, 2]), ("first_half", [0]), ("second_half", [1, 2])],
    ids=str,
)
def test_moe_layers_are_those_of_the_config(model_type, moe_layers, expected):
    model = make_model(model_type, num_hidden_layers=3, moe_layers=moe_layers)
    layers = getattr(model.base_model, model.base_model.layers_attribute)
    assert [i for i, layer in enumerate(layers) if isinstance(layer.mlp, MoeBlock)] == expected
    outputs = model(**make_inputs(), output_router_logits=True)
    assert len(outputs.router_logits) == len(model.moe_blocks()) == len(expected)
    assert outputs.logits.isfinite().all()


@every_type
def test_dense_layers_are_the_dense_models_own(model_type):
    config = make_config(model_type, num_hidden_layers=3, moe_layers=[1])
    model = make_model(model_type, num_hidden_layers=3, moe_layers=[1])
    layers = getattr(model.base_model, model.base_model.layers_attribute)
    assert type(layers[0].mlp).__module__.startswith("transformers.models.") and len(layers) == 3
    assert config.moe_layer_indices == [1]
