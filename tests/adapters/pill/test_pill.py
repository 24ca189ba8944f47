"""PILL inside a language model: what text and other tokens get, gradients, caches, padding."""

import pytest
import torch
from common.adapter_cases import tiny_llama
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from hf_moe.adapters.core import condition
from hf_moe.adapters.pill import FeedForwardNormLayer, HeadGate, PillConfig


IMAGE = 60
TEXT = torch.tensor([[5, 6, 7, 8, 9, 10], [9, 3, 2, 1, 4, 11]])
MIXED = torch.tensor([[5, IMAGE, IMAGE, 8, 9, 10], [9, 3, 2, IMAGE, IMAGE, 11]])


def config(**fields):
    return PillConfig(**({"modality_token_ids": {"image": IMAGE}, "r": 4} | fields))


def adapted(seed=0, **fields):
    base = tiny_llama()
    torch.manual_seed(seed)
    return get_peft_model(base, config(init_weights=False, **fields)).eval()


def logits(model, ids=MIXED, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def cells(model, container):
    return {name: p for name, p in model.named_parameters() if f".hfmoe_pill_{container}." in name}


def feed_forward_layers(model):
    return [module for module in model.modules() if isinstance(module, FeedForwardNormLayer)]


def test_text_is_the_base_bit_for_bit_and_other_tokens_are_not():
    expected, expected_mixed = logits(tiny_llama(), TEXT), logits(tiny_llama())
    model = get_peft_model(tiny_llama(), config()).eval()
    assert torch.equal(logits(model, TEXT), expected)
    got = logits(model)
    assert torch.equal(got[0, :1], expected_mixed[0, :1]) and torch.equal(got[1, :3], expected_mixed[1, :3])
    assert not torch.allclose(got[0, 1:], expected_mixed[0, 1:])


def test_closed_gates_take_values_away_and_leave_keys():
    base = tiny_llama()
    for layer in base.model.layers:
        layer.self_attn.v_proj.register_forward_hook(
            lambda module, args, output: output.masked_fill((MIXED == IMAGE).unsqueeze(-1), 0.0)
        )
    expected = logits(base)
    torch.testing.assert_close(logits(get_peft_model(tiny_llama(), config()).eval()), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fields", [{"attention_gate": False}, {"stage": "align"}, {"gate_modalities": []}])
def test_without_gating_fresh_weights_are_the_base_on_all_tokens(fields):
    assert torch.equal(logits(get_peft_model(tiny_llama(), config(**fields)).eval()), logits(tiny_llama()))


def test_swapping_adapters_and_negating_the_map_changes_nothing():
    mask = MIXED == IMAGE
    model = adapted(attention_gate=False)
    expected = logits(model, modality_mask=mask)
    assert torch.equal(expected, logits(model))
    for layer in feed_forward_layers(model):
        text, image = layer.cell("text", "default"), layer.cell("modality", "default")["image"]
        for left, right in zip(text.parameters(), image.parameters(), strict=True):
            left.data, right.data = right.data, left.data
    assert torch.equal(logits(model, modality_mask=~mask), expected)
    assert not torch.allclose(logits(model, modality_mask=mask), expected)


def test_image_adapters_and_gates_learn_nothing_from_text():
    model = adapted().train()
    model(input_ids=TEXT, labels=TEXT).loss.backward()
    for container in ("modality", "gate"):
        assert all(not p.grad.any() for p in cells(model, container).values())
    assert all(p.grad.any() for p in (cells(model, "text") | cells(model, "attn")).values())


def test_last_image_adapter_learns_only_next_to_labels_or_inverted():
    labels = MIXED.masked_fill(MIXED == IMAGE, -100)
    labels[:, :4] = -100  # answers only; in the second row the last image token would predict one
    labels[1] = -100

    def last_gradient(stage, labels, **fields):
        model = adapted(stage=stage, **fields).train()
        model(input_ids=MIXED, labels=labels).loss.backward()
        *_, cell = feed_forward_layers(model)
        return cell.cell("modality", "default")["image"].up.weight.grad

    assert not last_gradient("instruct", labels).any()
    assert not last_gradient("align", labels).any()
    assert last_gradient("align", labels, last_layer_invert=True).any()
    assert not last_gradient("instruct", labels, last_layer_invert=True).any()
    labels[0, 3] = MIXED[0, 3]  # right after the image
    assert last_gradient("instruct", labels).any()


def test_inversion_swaps_adapters_in_the_last_layer_only_while_aligning():
    plain, inverted = adapted(stage="align"), adapted(stage="align", last_layer_invert=True)
    assert not torch.allclose(logits(plain), logits(inverted))
    *_, layer = feed_forward_layers(plain)
    text, image = layer.cell("text", "default"), layer.cell("modality", "default")["image"]
    for left, right in zip(text.parameters(), image.parameters(), strict=True):
        left.data, right.data = right.data, left.data
    assert torch.equal(logits(plain), logits(inverted))
    assert torch.equal(logits(plain, TEXT), logits(inverted, TEXT))
    plain, inverted = adapted(), adapted(last_layer_invert=True)
    assert torch.equal(logits(plain), logits(inverted))


def test_cached_generation_is_that_without_a_cache_and_with_padding_on_either_side():
    model = adapted()
    settings = {"max_new_tokens": 8, "do_sample": False}
    mask = torch.ones_like(MIXED)
    expected = model.generate(input_ids=MIXED, attention_mask=mask, **settings)[:, 6:]
    assert torch.equal(
        model.generate(input_ids=MIXED, attention_mask=mask, use_cache=False, **settings)[:, 6:], expected
    )
    padded = torch.nn.functional.pad(MIXED, (3, 0))
    mask = torch.nn.functional.pad(mask, (3, 0))
    assert torch.equal(model.generate(input_ids=padded, attention_mask=mask, **settings)[:, 9:], expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_token(side):
    model = adapted()
    width = (3, 0) if side == "left" else (0, 3)
    ids, mask = (torch.nn.functional.pad(t, width) for t in (MIXED, torch.ones_like(MIXED)))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = logits(model, ids, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(got[mask.bool()].view(2, 6, -1), logits(model), rtol=0, atol=1e-6)


def test_embeddings_with_a_map_are_ids_with_placeholders():
    model = adapted()
    embeds = model.get_input_embeddings()(MIXED).detach()
    mask = (MIXED == IMAGE).long()
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeds, modality_mask=mask).logits, logits(model))
    settings = {"attention_mask": torch.ones_like(MIXED), "max_new_tokens": 6, "do_sample": False}
    for beams in (1, 3):
        expected = model.generate(input_ids=MIXED, num_beams=beams, **settings)[:, 6:]
        with condition(model, modality_mask=mask):
            assert torch.equal(model.generate(inputs_embeds=embeds, num_beams=beams, **settings), expected)


def test_a_single_token_is_text_unless_the_call_says_otherwise():
    model = adapted()
    one = torch.tensor([[IMAGE]])
    text = logits(model, one, modality_mask=torch.zeros_like(one))
    assert torch.equal(logits(model, one), text)
    assert not torch.allclose(logits(model, one, modality_mask=torch.ones_like(one)), text)


def test_one_row_of_a_map_serves_all_rows():
    model = adapted()
    row = torch.tensor([[0, 1, 1, 0, 0, 0]])
    assert torch.equal(logits(model, TEXT, modality_mask=row), logits(model, TEXT, modality_mask=row.expand(2, -1)))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.zeros(2, 5, dtype=torch.long), ValueError, "5 tokens per row, but the model runs on 6"),
        (torch.zeros(3, 6, dtype=torch.long), ValueError, "3 rows for a batch of 2"),
        (torch.full((2, 6), 2), ValueError, "has the number 2; modalities are numbered from 0 to 1"),
        (torch.full((2, 6), -1), ValueError, "has the number -1"),
        (torch.zeros(6, dtype=torch.long), ValueError, "shape \\(batch, sequence\\), got \\(6,\\)"),
        (torch.zeros(2, 6), TypeError, "integers or booleans, got torch.float32"),
        ([[0] * 6] * 2, TypeError, "must be a tensor"),
    ],
)
def test_maps_that_do_not_fit_are_refused(mask, error, message):
    with pytest.raises(error, match=message):
        logits(adapted(), modality_mask=mask)


def test_embeddings_without_a_map_are_refused():
    model = adapted()
    with pytest.raises(ValueError, match=r"does not say which tokens are image. Pass `modality_mask`"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(TypeError, match=r"3 modalities.*got booleans"):
        logits(adapted(modalities=["text", "image", "audio"]), modality_mask=MIXED == IMAGE)


def test_each_of_many_modalities_has_its_adapter_and_only_chosen_ones_a_gate():
    names = ["text", "image", "audio", "touch"]
    fields = {"modalities": names, "modality_token_ids": {"image": 60, "audio": [61, 62]}, "adapt_attention": False}
    model = adapted(**fields, gate_modalities=["audio"]).train()
    ids = torch.tensor([[5, 60, 61, 62, 9, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    first = cells(model.base_model.model.model.layers[0], "modality")
    learned = {name: {p.grad.any().item() for n, p in first.items() if f".{name}." in n} for name in names[1:]}
    assert learned == {"image": {True}, "audio": {True}, "touch": {False}}
    gates = [module for module in model.modules() if isinstance(module, HeadGate)]
    seen = []
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    layer.register_forward_hook(lambda module, args, output: seen.append((module.base_layer(args[0]), output)))
    model.eval()
    logits(model, ids)
    plain, gated = seen[0]
    assert torch.equal(plain[0, [0, 1, 4, 5]], gated[0, [0, 1, 4, 5]])
    assert not torch.isclose(plain[0, 2:4], gated[0, 2:4]).any()
    assert len(gates) == 2 and gates[0].weight.shape == (2, 32)  # one per key-value head, not per head


def test_gathering_agrees_with_all_adapters_on_all_tokens():
    fields = {"modalities": ["text", "image", "audio"], "modality_token_ids": {"image": 60, "audio": 61}}
    model = adapted(**fields)
    ids = torch.tensor([[5, 60, 61, 8], [60, 61, 3, 4]])
    layer = feed_forward_layers(model)[0]
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append((module.base_layer(args[0]), output)))
    logits(model, ids)
    states, got = seen[0]
    experts = [layer.cell("text", "default"), *layer.cell("modality", "default").values()]
    everywhere = torch.stack([expert(states) for expert in experts])
    chosen = torch.tensor([[0, 1, 2, 0], [1, 2, 0, 0]])
    wanted = states + sum(everywhere[i] * (chosen == i).unsqueeze(-1) for i in range(3))
    torch.testing.assert_close(got, wanted)


def test_adapters_of_a_mixed_batch_keep_their_own_placeholders():
    model = adapted()
    torch.manual_seed(1)
    model.add_adapter("second", config(init_weights=False, modality_token_ids={"image": 9}))
    model.eval()
    expected = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = logits(model)
    mixed = logits(model, adapter_names=["second", "default"])
    torch.testing.assert_close(mixed[0], expected["second"][0])
    torch.testing.assert_close(mixed[1], expected["default"][1])
    given = logits(model, adapter_names=["second", "__base__"], modality_mask=(MIXED == 9).long())
    torch.testing.assert_close(given[0], expected["second"][0])
    torch.testing.assert_close(given[1], logits(tiny_llama())[1])


def test_one_adapter_for_all_modalities_ignores_the_map():
    model = adapted(modality_experts=False, attention_gate=False)
    assert torch.equal(logits(model), logits(model, modality_mask=torch.zeros_like(MIXED)))
    assert not cells(model, "text") and all(".shared." in name for name in cells(model, "modality"))
    assert get_peft_model(tiny_llama(), config(modality_experts=False, stage="align")).get_nb_trainable_parameters()[0]


def test_stages_bypass_and_use_the_gate():
    model = adapted()
    gated = logits(model)
    model.set_stage("default", "align")
    assert not torch.allclose(logits(model), gated)
    torch.testing.assert_close(logits(model), logits(adapted(attention_gate=False)), rtol=1.0, atol=1.0)
    model.set_stage("default", "instruct")
    assert torch.equal(logits(model), gated)


def test_the_trainer_hands_over_a_column_with_maps(tmp_path):
    model = get_peft_model(tiny_llama(), PillConfig(r=4))
    rows = [
        {"input_ids": ids, "labels": ids.masked_fill(ids == IMAGE, -100), "modality_mask": (ids == IMAGE).long()}
        for ids in MIXED
    ]
    arguments = TrainingArguments(
        tmp_path, max_steps=8, learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, per_device_train_batch_size=2,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    assert any(p.any() for p in cells(model, "gate").values())
    assert all(p.any() for name, p in cells(model, "modality").items() if ".layers.0." in name)
