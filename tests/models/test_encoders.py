"""MoE encoders: the dense models with other feed-forwards, their heads, their losses, and what they refuse."""

import json

import pytest
import torch
import transformers
from common.model_battery import (
    ENCODER_HEADS,
    ENCODERS,
    VOCABULARY,
    force_routers,
    make_config,
    make_inputs,
    make_model,
    seeded,
)
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForMaskedLM, Trainer, TrainingArguments, pipeline
from transformers.utils.output_capturing import maybe_install_capturing_hooks

import hf_moe
from hf_moe.layers import MoeBlock
from hf_moe.routing import BaseRouter
from hf_moe.routing.balance import expert_frequency, load_balance_loss


every_type = pytest.mark.parametrize("model_type", ENCODERS)
every_head = pytest.mark.parametrize("head", ENCODER_HEADS)
B, S, T = 2, 8, 16
SHAPES = {
    "ForMaskedLM": (B, S, VOCABULARY),
    "ForSequenceClassification": (B, 3),
    "ForTokenClassification": (B, S, 3),
    "ForQuestionAnswering": (B, S),
}
with_loss = pytest.mark.parametrize("head", SHAPES)
BALANCED = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
STATEFUL = {"router_type": "gating_residual", "num_hidden_layers": 3, "moe_layers": [0, 2]}


def targets(head, inputs) -> dict:
    """Labels as the head wants them."""
    ids = inputs["input_ids"]
    if head == "ForQuestionAnswering":
        return {"start_positions": ids[:, 0] % S, "end_positions": ids[:, 1] % S}
    if head == "ForSequenceClassification":
        return {"labels": ids[:, 0] % 3}
    labels = ids.clone() if head == "ForMaskedLM" else ids % 3
    labels[inputs["attention_mask"] == 0] = -100
    return {"labels": labels}


def make(model_type, head="ForMaskedLM", **changes):
    return make_model(model_type, head, **({} if head == "ForQuestionAnswering" else {"num_labels": 3}), **changes)


def logits_of(outputs):
    return outputs["start_logits"] if "start_logits" in outputs else outputs["logits"]


def train_step(model, inputs, labels, seed=3):
    model.zero_grad()
    with seeded(seed):
        outputs = model(**inputs, **labels)
        outputs.loss.backward()
    return outputs, {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def auto(head):
    return transformers.AutoModel if head == "Model" else getattr(transformers, f"AutoModel{head}")


# -- the dense model's own -------------------------------------------------------------------------------------------
@every_type
@with_loss
def test_heads_and_losses_are_those_of_the_dense_model(model_type, head):
    """All experts alike are the dense feed-forward; everything else has to be the dense class's own."""
    moe = make(model_type, head, num_experts_per_tok=1)
    dense_type = model_type.removeprefix("moe_")
    fields = {k: v for k, v in moe.config.to_dict().items() if k not in ("model_type", "architectures")}
    config = transformers.AutoConfig.for_model(dense_type, **fields)
    dense = auto(head).from_config(config).eval()
    state = moe.state_dict()
    own = {name: tensor for name, tensor in state.items() if ".mlp." not in name and "load_balancer" not in name}
    missing, unexpected = dense.load_state_dict(own, strict=False)
    assert not unexpected and all(".intermediate." in name or ".output.dense." in name for name in missing)
    base, dense_base = moe.base_model, dense.base_model
    for layer, other in zip(base.encoder.layer, dense_base.encoder.layer, strict=True):
        bank = layer.mlp.experts
        pairs = (
            (bank.up_proj, other.intermediate.dense.weight),
            (bank.up_proj_bias, other.intermediate.dense.bias),
            (bank.down_proj, other.output.dense.weight),
            (bank.down_proj_bias, other.output.dense.bias),
        )
        for stacked, single in pairs:
            single.data.copy_(stacked.data[0])
            stacked.data.copy_(stacked.data[:1].expand_as(stacked))
    # The dense loss of answers counts the logits of padding, which no expert computes.
    inputs = make_inputs(padding=None if head == "ForQuestionAnswering" else "right")
    inputs["token_type_ids"] = make_inputs(seed=3)["input_ids"] % 2
    labels, real = targets(head, inputs), inputs["attention_mask"].bool()
    ours, theirs = moe(**inputs, **labels), dense(**inputs, **labels)
    found, expected = (x[real] if x.shape[:2] == (B, S) else x for x in map(logits_of, (ours, theirs)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=1e-5)
    assert isinstance(moe, type(dense))


@every_type
@every_head
def test_forward_has_the_shapes_of_the_contract(model_type, head):
    model = make(model_type, head)
    outputs = model(
        **make_inputs(padding="right"), output_router_logits=True, output_hidden_states=True, output_attentions=False
    )
    if head == "Model":
        assert outputs.last_hidden_state.shape == (B, S, 32) and outputs.pooler_output.shape == (B, 32)
    else:
        assert logits_of(outputs).shape == SHAPES[head]
        assert outputs.aux_loss.shape == () and outputs.loss is None
    for logits, index in zip(outputs.router_logits, outputs.router_indices, strict=True):
        assert logits.shape == (T, 4) and logits.dtype == torch.float32
        assert index.shape == (T, 2) and index.dtype == torch.int64
    assert len(outputs.router_logits) == 2 and len(outputs.hidden_states) == 3
    assert torch.equal(model(**make_inputs(padding="right"), return_dict=False)[0], outputs.to_tuple()[0])


@every_type
@every_head
def test_nothing_is_recorded_at_evaluation_unless_asked_for(model_type, head):
    outputs = make(model_type, head)(**make_inputs())
    for key in ("router_logits", "router_indices", "aux_loss", "all_router_logits", "hidden_states", "attentions"):
        assert outputs.get(key) is None, key


@every_type
def test_attentions_are_recorded_under_eager_attention(model_type):
    model = make(model_type, implementation={"attn_implementation": "eager"})
    outputs = model(**make_inputs(), output_attentions=True, output_router_logits=True)
    assert [attention.shape for attention in outputs.attentions] == [(B, 4, S, S)] * 2


@every_type
def test_chunks_of_the_dense_layers_change_nothing(model_type):
    model, inputs = make(model_type, num_hidden_layers=3, moe_layers=[1]), make_inputs(padding="right")
    expected = model(**inputs).logits
    for layer in model.base_model.encoder.layer:
        layer.chunk_size_feed_forward = 2
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


@every_type
@pytest.mark.parametrize(("moe_layers", "expected"), [("all", [0, 1, 2]), ("every:2", [1]), ([0, 2], [0, 2])], ids=str)
def test_moe_layers_are_those_of_the_config(model_type, moe_layers, expected):
    model = make(model_type, num_hidden_layers=3, moe_layers=moe_layers)
    layers = model.base_model.encoder.layer
    assert [i for i, la in enumerate(layers) if isinstance(getattr(la, "mlp", None), MoeBlock)] == expected
    assert [i for i, la in enumerate(layers) if not hasattr(la, "intermediate")] == expected
    outputs = model(**make_inputs(), output_router_logits=True)
    assert len(outputs.router_logits) == len(expected) and outputs.logits.isfinite().all()
    assert [view.name for view in hf_moe.moe_layers(model)] == [name for name, _ in model.moe_blocks()]


# -- losses ----------------------------------------------------------------------------------------------------------
@every_type
@with_loss
def test_loss_is_the_heads_plus_coefficient_times_balance(model_type, head):
    model = make(model_type, head, router_aux_loss_coef=0.5).train()
    inputs = make_inputs(padding="right")
    labels = targets(head, inputs)
    outputs = model(**inputs, **labels)
    plain = model.eval()(**inputs, **labels).loss
    mask, values = inputs["attention_mask"].flatten().bool(), []
    for (_, block), logits, index in zip(
        model.moe_blocks(), outputs.router_logits, outputs.router_indices, strict=True
    ):
        frequency = expert_frequency(index, 4, mask)
        values.append(load_balance_loss(block.gate.probabilities(logits), frequency, mask))
    expected = torch.stack(values).mean()
    torch.testing.assert_close(outputs.aux_loss, expected)
    torch.testing.assert_close(outputs.loss, plain + 0.5 * expected)
    gates = [block.gate.weight for _, block in model.moe_blocks()]
    assert all(gradient.any() for gradient in torch.autograd.grad(outputs.aux_loss, gates))


@every_type
def test_num_items_in_batch_normalises_masked_language_modelling_alone(model_type):
    inputs = make_inputs()
    model = make(model_type)
    labels = inputs["input_ids"].masked_fill(torch.rand(B, S, generator=torch.Generator().manual_seed(0)) < 0.5, -100)
    count = (labels != -100).sum()
    mean = model(**inputs, labels=labels).loss
    torch.testing.assert_close(model(**inputs, labels=labels, num_items_in_batch=count * 10).loss * 10, mean)
    for head in ENCODER_HEADS[2:]:
        assert make(model_type, head).accepts_loss_kwargs is False


@every_type
def test_a_masked_language_model_learns_a_batch_by_heart(model_type):
    model, inputs = make(model_type, initializer_range=0.05).train(), make_inputs()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        outputs, _ = train_step(model, inputs, {"labels": inputs["input_ids"]})
        optimizer.step()
        losses.append(outputs.loss.item())
    assert losses[-1] < 0.2 * losses[0]


# -- padding and routers ---------------------------------------------------------------------------------------------
@every_type
@pytest.mark.parametrize("router_type", hf_moe.list_routers())
def test_every_router_trains_and_leaves_padding_out(model_type, router_type):
    options = {"fallback": "expert_choice"} if router_type == "expert_choice" else {}  # an encoder sees all tokens
    model = make(model_type, router_type=router_type, router_config=options, expert_capacity_factor=None)
    inputs = make_inputs(padding="right")
    padding = inputs["attention_mask"].flatten() == 0
    outputs = model(**inputs, output_router_logits=True)
    assert all((index[padding] == model.config.num_routing_targets).all() for index in outputs.router_indices)
    loss = model.train()(**inputs, **targets("ForMaskedLM", inputs)).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert any(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if ".experts." in name)


@every_type
def test_a_real_token_does_not_notice_padding(model_type):
    model, inputs = make(model_type), make_inputs(padding="right")
    short = model(input_ids=inputs["input_ids"][:1, :-3]).logits
    torch.testing.assert_close(model(**inputs).logits[:1, :-3], short, rtol=1e-4, atol=1e-5)


@every_type
def test_hash_routing_needs_token_ids(model_type):
    model = make(model_type, router_type="hash")
    ids = make_inputs()["input_ids"]
    first = model(input_ids=ids, output_router_logits=True).router_indices[0]
    table = model.moe_blocks()[0][1].gate.table
    assert torch.equal(first.sort(-1).values, table[ids.flatten()].sort(-1).values)
    with pytest.raises(ValueError, match="routes by token id, but got no `input_ids`"):
        model(inputs_embeds=model.get_input_embeddings()(ids))


@every_type
def test_embeddings_may_replace_token_ids(model_type):
    model, inputs = make(model_type), make_inputs(batch=1)
    embedded = model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]))
    torch.testing.assert_close(embedded.logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)


@every_type
def test_router_states_cross_dense_layers(model_type):
    model, inputs, seen = make(model_type, **STATEFUL), make_inputs(), []
    last = model.moe_blocks()[1][1].gate
    last.register_forward_pre_hook(lambda _, args: seen.append(args[1].prev_state))
    outputs = model(**inputs, output_router_logits=True, output_hidden_states=True)
    assert torch.equal(seen[0], outputs.router_logits[0])
    assert all(isinstance(state, torch.Tensor) for state in outputs.hidden_states)


# -- training modes --------------------------------------------------------------------------------------------------
@every_type
@pytest.mark.parametrize("fields", [{}, STATEFUL], ids=["own", "stateful"])
def test_checkpointing_gives_the_same_loss_and_gradients(model_type, fields):
    model, inputs = make(model_type, **{**BALANCED, **fields}).train(), make_inputs(padding="right")
    plain, expected = train_step(model, inputs, targets("ForMaskedLM", inputs))
    with pytest.raises(ValueError, match="would drop the gradient"):
        model.activation_checkpointing_enable({"use_reentrant": True})
    model.activation_checkpointing_enable({"use_reentrant": False})
    checkpointed, gradients = train_step(model, inputs, targets("ForMaskedLM", inputs))
    assert torch.equal(checkpointed.loss, plain.loss) and len(checkpointed.router_logits) == len(plain.router_logits)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # inside transformers
def test_a_compiled_training_step_has_the_same_loss_and_gradients():
    model, inputs = make("moe_bert", **BALANCED).train(), make_inputs(padding="right")
    labels = targets("ForMaskedLM", inputs)
    plain, expected = train_step(model, inputs, labels)
    maybe_install_capturing_hooks(model.base_model)  # hooks are otherwise installed under a lock, which breaks graphs
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = compiled(**inputs, **labels)
    torch.testing.assert_close(outputs.loss, plain.loss)
    model.zero_grad()
    outputs.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)
    torch._dynamo.reset()


@every_type
def test_half_precision_keeps_routers_in_full_precision(model_type, tmp_path):
    model = make(model_type, "ForSequenceClassification")
    model.save_pretrained(tmp_path)
    half = auto("ForSequenceClassification").from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, tensor in half.named_parameters():
        assert tensor.dtype == (torch.float32 if ".mlp.gate." in name else torch.bfloat16), name
    inputs = make_inputs(padding="right")
    outputs = half(**inputs, **targets("ForSequenceClassification", inputs))
    assert outputs.loss.isfinite() and outputs.logits.dtype == torch.bfloat16
    torch.testing.assert_close(outputs.logits.float(), model(**inputs).logits, rtol=0.1, atol=0.3)


@every_type
@with_loss
def test_the_stock_trainer_trains_and_predicts(model_type, head, tmp_path):
    model, inputs = make(model_type, head, output_router_logits=True), make_inputs(batch=4)
    rows = [{k: v[i] for k, v in {**inputs, **targets(head, inputs)}.items()} for i in range(4)]
    arguments = TrainingArguments(tmp_path, max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
    run = Trainer(model, arguments, train_dataset=rows)
    assert run.train().training_loss > 0
    predictions = run.predict(rows).predictions
    predictions = predictions[0] if isinstance(predictions, tuple) else predictions
    expected = logits_of(model.eval()(**inputs)).detach()
    torch.testing.assert_close(torch.from_numpy(predictions), expected, rtol=1e-4, atol=1e-5)


# -- files -----------------------------------------------------------------------------------------------------------
@every_type
@every_head
def test_a_reloaded_model_is_the_same(model_type, head, tmp_path):
    rich = {"num_shared_experts": 1, "residual_expert": True, "num_hidden_layers": 3, "moe_layers": [0, 2]}
    model = make(model_type, head, **rich)
    force_routers(model, temperature=0.7)
    model.save_pretrained(tmp_path)
    reloaded, report = auto(head).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert type(reloaded) is type(model) and reloaded.config._experts_implementation == "grouped_mm"
    found, wanted = reloaded.state_dict(), model.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    inputs = make_inputs(padding="right")
    torch.testing.assert_close(reloaded(**inputs)[0], model(**inputs)[0])
    names = {name.split(".mlp.", 1)[1] for name in load_file(tmp_path / "model.safetensors") if ".mlp." in name}
    assert {"gate.weight", "experts.up_proj", "experts.down_proj", "experts.down_proj_bias"} <= names
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForMaskedLM"].startswith("hf_moe_shim.Moe")


@every_type
def test_embeddings_are_tied_and_can_be_resized(model_type, tmp_path):
    model, inputs = make(model_type), make_inputs()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    expected = model(**inputs).logits
    with seeded():
        model.resize_token_embeddings(70)
    torch.testing.assert_close(model(**inputs).logits[..., :VOCABULARY], expected)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(**inputs).logits, model(**inputs).logits)


@every_type
def test_a_base_model_gains_a_head(model_type, tmp_path):
    base = make(model_type, "Model")
    base.save_pretrained(tmp_path)
    classifier = auto("ForSequenceClassification").from_pretrained(tmp_path)
    inputs = make_inputs()
    found = classifier.base_model(**inputs).last_hidden_state
    torch.testing.assert_close(found, base(**inputs).last_hidden_state)


@every_type
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_implementations_agree_and_are_kept(model_type, implementation):
    model = make(model_type, "ForTokenClassification", implementation={"experts_implementation": implementation})
    assert model.config._experts_implementation == implementation
    reference = make(model_type, "ForTokenClassification", implementation={"experts_implementation": "eager"})
    torch.testing.assert_close(model(**make_inputs())[0], reference(**make_inputs())[0], rtol=1e-4, atol=1e-5)


@pytest.fixture
def tokenizer():
    """Words `w5` ... `w63` with BERT's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate([*special, *(f"w{i}" for i in range(5, VOCABULARY))])}, "[UNK]")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {f"{name}_token": token for name, token in zip(("pad", "unk", "cls", "sep", "mask"), special, strict=True)}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=32, **named)


@every_type
def test_pipelines_fill_masks_and_classify(model_type, tokenizer, tmp_path):
    for head in ("ForMaskedLM", "ForSequenceClassification"):
        make(model_type, head).save_pretrained(tmp_path / head)
        tokenizer.save_pretrained(tmp_path / head)
    fill = pipeline("fill-mask", str(tmp_path / "ForMaskedLM"), device="cpu")
    found = fill("w7 [MASK] w9", top_k=3)
    assert len(found) == 3 and found[0]["score"] >= found[1]["score"] > 0
    classify = pipeline("text-classification", str(tmp_path / "ForSequenceClassification"), device="cpu")
    one, two = classify(["w7 w8", "w9 w10 w11"], batch_size=2)
    assert {one["label"], two["label"]} <= {"LABEL_0", "LABEL_1", "LABEL_2"} and 0 < one["score"] <= 1


def test_lora_on_attention_and_experts_trains_and_merges():
    from peft import LoraConfig, get_peft_model

    base, inputs = make("moe_bert", "ForSequenceClassification"), make_inputs()
    adapted = get_peft_model(
        base,
        LoraConfig(
            task_type="SEQ_CLS",
            r=4,
            target_modules=["query", "value"],
            target_parameters=["mlp.experts.up_proj", "mlp.experts.down_proj"],
        ),
    )
    loss = adapted.train()(**inputs, **targets("ForSequenceClassification", inputs)).loss
    loss.backward()
    touched = [name for name, p in adapted.named_parameters() if p.grad is not None and "lora_B" in name]
    assert any(".experts" in name for name in touched) and any(".query" in name for name in touched)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    expected = adapted.eval()(**inputs).logits
    torch.testing.assert_close(adapted.merge_and_unload()(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


# -- what is refused -------------------------------------------------------------------------------------------------
@every_type
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"is_decoder": True}, "`is_decoder` must be False, got True: `moe_.*` is an encoder. Use a decoder such as"),
        ({"add_cross_attention": True}, "`add_cross_attention` must be False"),
        ({"num_experts_per_tok": 9}, "`num_experts_per_tok` must be between 1 and"),
        ({"router_type": "softmax_tpok"}, "Did you mean 'softmax_topk'"),
    ],
    ids=str,
)
def test_what_an_encoder_cannot_be_is_refused(model_type, fields, message):
    with pytest.raises(ValueError, match=message):
        make_config(model_type, **fields)


@every_type
@with_loss
def test_arguments_of_a_decoder_are_refused(model_type, head):
    model, inputs = make(model_type, head), make_inputs()
    with pytest.raises(ValueError, match=r"`encoder_hidden_states` was passed, but `moe_.*` is an encoder"):
        model(**inputs, encoder_hidden_states=torch.zeros(B, S, 32))
    assert not hasattr(model, "generate")


@every_type
def test_configs_have_the_dense_fields_and_survive_files(model_type, tmp_path):
    config = make_config(model_type, router_type="comet", router_config={"gamma": 0.5}, moe_intermediate_size=16)
    assert config.expert_type == "mlp_bias" and config.num_local_experts == 4 and config.intermediate_width == 48
    config.save_pretrained(tmp_path)
    reloaded = AutoConfig.from_pretrained(tmp_path)
    assert type(reloaded) is type(config) and reloaded.to_dict() == {
        **config.to_dict(),
        "_name_or_path": str(tmp_path),
    }
    plan = {name.replace("*", "0") for name in config.base_model_ep_plan}
    names = {name for name, _ in make(model_type, "Model").named_parameters()}
    assert {name for name in plan if name.count(".") > 4} <= names
    assert any(isinstance(m, BaseRouter) for m in make(model_type).modules())
