"""Gradients of every model type: complete, the same under checkpointing and compilation, and good enough to learn."""

import copy

import pytest
import torch
from common.model_battery import HEADS, TYPES, make_inputs, make_model, seeded
from transformers.utils.output_capturing import maybe_install_capturing_hooks


every_type = pytest.mark.parametrize("model_type", TYPES)
LABELS = {
    "ForCausalLM": lambda ids: ids,
    "ForSequenceClassification": lambda ids: ids[:, 0] % 2,
    "ForTokenClassification": lambda ids: ids % 2,
}
BALANCED = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
STATEFUL = {"router_type": "gating_residual", "num_hidden_layers": 3, "moe_layers": [0, 2]}


def train_step(model, inputs, labels=None, seed=3):
    """Loss and gradients of one step."""
    model.zero_grad()
    with seeded(seed):
        outputs = model(**inputs, labels=inputs["input_ids"] if labels is None else labels)
        outputs.loss.backward()
    return outputs, {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


# -- complete --------------------------------------------------------------------------------------------------------
@every_type
@pytest.mark.parametrize("head", LABELS)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_every_parameter_gets_a_finite_gradient(model_type, head, implementation):
    model = make_model(
        model_type, head, implementation={"experts_implementation": implementation}, num_shared_experts=1
    ).train()
    inputs = make_inputs(padding="right")
    _, gradients = train_step(model, inputs, LABELS[head](inputs["input_ids"]))
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.isfinite().all(), name
        # DDP only asks for a gradient; what nobody routed to has zeros.
        assert gradient.any() or ".experts." in name or ".zero_experts." in name, name


@every_type
def test_a_few_steps_learn_a_batch_by_heart(model_type):
    model, inputs = make_model(model_type, initializer_range=0.05).train(), make_inputs()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        outputs, _ = train_step(model, inputs)
        optimizer.step()
        losses.append(outputs.loss.item())
    assert losses[-1] < 0.2 * losses[0]


@every_type
def test_training_in_half_precision_is_finite(model_type):
    model, inputs = make_model(model_type).train(), make_inputs(padding="left")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, gradients = train_step(model, inputs)
    assert outputs.loss.isfinite() and all(logits.dtype == torch.float32 for logits in outputs.router_logits)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@every_type
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_rows_of_nothing_but_padding_leave_gradients_finite(model_type, implementation):
    model = make_model(model_type, implementation={"experts_implementation": implementation}, **BALANCED).train()
    inputs = make_inputs()
    for rows in (slice(0, 1), slice(None)):  # one row, then all of them
        inputs["attention_mask"][rows] = 0
        outputs = model(**inputs)
        (outputs.logits.square().mean() + outputs.aux_loss).backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@every_type
def test_frozen_routers_and_frozen_backbones_train_the_rest(model_type):
    inputs = make_inputs()
    for frozen in (".gate.", ".experts."):
        model = make_model(model_type, router_aux_loss_coef=0.5).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen not in name)
        _, gradients = train_step(model, inputs)
        assert all((gradient is None) == (frozen in name) for name, gradient in gradients.items())


# -- checkpointing ---------------------------------------------------------------------------------------------------
@every_type
@pytest.mark.parametrize("fields", [{}, STATEFUL], ids=["own", "stateful"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_checkpointing_gives_the_same_loss_and_gradients(model_type, fields, implementation):
    model = make_model(
        model_type, implementation={"experts_implementation": implementation}, **{**BALANCED, **fields}
    ).train()
    inputs = make_inputs(padding="left")
    plain, expected = train_step(model, inputs)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert model.is_activation_checkpointing
    checkpointed, gradients = train_step(model, inputs)
    assert torch.equal(checkpointed.loss, plain.loss) and torch.equal(checkpointed.aux_loss, plain.aux_loss)
    assert len(checkpointed.router_logits) == len(plain.router_logits)  # recorded once, not twice
    assert_same_gradients(gradients, expected, rtol=1e-4, atol=1e-6)


@every_type
@pytest.mark.parametrize("noise", ["gaussian", "jitter"])
def test_checkpointing_repeats_the_random_choices(model_type, noise):
    options = {"router_type": "softmax_topk", "router_config": {"noise": noise, "noise_std": 0.5}}
    model, inputs = make_model(model_type, **BALANCED, **options).train(), make_inputs()
    plain, expected = train_step(model, inputs)
    model.activation_checkpointing_enable()
    checkpointed, gradients = train_step(model, inputs)
    assert torch.equal(checkpointed.loss, plain.loss)
    assert_same_gradients(gradients, expected, rtol=1e-4, atol=1e-6)


@every_type
@pytest.mark.parametrize("method", ["activation_checkpointing_enable", "gradient_checkpointing_enable"])
@pytest.mark.parametrize("fields", [{}, {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.1}], ids=str)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_reentrant_checkpointing_is_refused_where_it_would_drop_gradients(model_type, method, fields):
    model = make_model(model_type, **fields)
    with pytest.raises(ValueError, match=r"'use_reentrant': True\}` would drop the gradient.*'use_reentrant': False"):
        getattr(model, method)({"use_reentrant": True})
    assert not model.is_activation_checkpointing


@pytest.mark.parametrize("model_type", [t for t in TYPES if t != "moe_plus_plus"])
def test_reentrant_checkpointing_works_where_nothing_can_be_dropped(model_type):
    model, inputs = make_model(model_type, router_aux_loss_coef=0.0).train(), make_inputs()
    plain, expected = train_step(model, inputs)
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    checkpointed, gradients = train_step(model, inputs)
    assert torch.equal(checkpointed.loss, plain.loss)
    assert_same_gradients(gradients, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_refuses_reentrant_checkpointing(head):
    with pytest.raises(ValueError, match="use_reentrant"):
        make_model("moe_llama", head).activation_checkpointing_enable({"use_reentrant": True})


# -- compilation -----------------------------------------------------------------------------------------------------
@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield lambda model: torch.compile(model, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


@every_type
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # inside transformers
def test_a_compiled_training_step_has_the_same_loss_and_gradients(model_type, compiler):
    model, inputs = make_model(model_type, **BALANCED).train(), make_inputs(padding="right")
    plain, expected = train_step(model, inputs)
    maybe_install_capturing_hooks(model.base_model)  # hooks are otherwise installed under a lock, which breaks graphs
    compiled = compiler(model)
    with seeded(3):
        outputs = compiled(**inputs, labels=inputs["input_ids"])
    torch.testing.assert_close(outputs.loss, plain.loss)
    torch.testing.assert_close(outputs.aux_loss, plain.aux_loss)
    for logits, reference in zip(outputs.router_logits, plain.router_logits, strict=True):
        torch.testing.assert_close(logits, reference)
    model.zero_grad()
    outputs.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert_same_gradients(gradients, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "implementation"),
    [("moe_gpt2", "grouped_mm"), ("moe_llama", "batched_mm"), ("moe_plus_plus", "grouped_mm")],
)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@torch.no_grad()
def test_a_compiled_forward_has_the_same_logits(model_type, implementation, compiler):
    model = make_model(model_type, implementation={"experts_implementation": implementation})
    inputs = make_inputs(padding="left")
    expected = model(**inputs, use_cache=False).logits
    outputs = compiler(model)(**inputs, use_cache=False)
    torch.testing.assert_close(outputs.logits, expected, rtol=1e-4, atol=1e-5)


# -- copies ----------------------------------------------------------------------------------------------------------
@every_type
def test_a_deep_copy_trains_apart_from_its_original(model_type):
    model, inputs = make_model(model_type).train(), make_inputs()
    twin = copy.deepcopy(model)
    _, expected = train_step(model, inputs)
    _, gradients = train_step(twin, inputs)
    assert_same_gradients(gradients, expected, rtol=0, atol=0)
    with torch.no_grad():
        twin.base_model.load_balancer.counts.add_(1)
        next(twin.parameters()).zero_()
    assert next(model.parameters()).any() and not model.base_model.load_balancer.counts.any()
