"""Routing reports of a model that sees images: which experts their tokens visit, and which those of the text."""

import pytest
import torch
from common.tiny_llava import images, make_processor, moe_llava

from hf_moe import moe_layers, record_routing
from hf_moe.reporting import routing_report


@pytest.fixture
def processor(tiny_tokenizer):
    return make_processor(tiny_tokenizer)


@pytest.fixture
def model(processor):
    model = moe_llava(text={"vocab_size": len(processor.tokenizer)})
    model.config.image_token_index = processor.image_token_id
    return model


def batches(processor, count=2):
    texts = ["<image>the river runs", "a miller kept <image> cats"]
    return [processor(images=images(2, seed), text=texts, padding=True, return_tensors="pt") for seed in range(count)]


def test_image_tokens_are_a_class_of_their_own(model, processor, tmp_path):
    rows = batches(processor)
    report = routing_report(model, processor, rows)
    assert report.token_classes["image"] == 16 and report.token_classes["word"] > 0
    ids = torch.cat([batch["input_ids"].flatten() for batch in rows])
    with record_routing(model) as recorder:
        for batch in rows:
            model(**batch)
    for layer, record in zip(report.layers, recorder.layers, strict=True):
        index = torch.cat(record.top_k_index)[ids == processor.image_token_id]
        expected = torch.bincount(index.flatten(), minlength=4) / index.numel()
        torch.testing.assert_close(torch.tensor(layer.class_load["image"]), expected.double(), check_dtype=False)
    report.save(tmp_path / "report")
    (table,) = (tmp_path / "report").glob("*.md")
    assert "image" in table.read_text()


def test_batches_are_read_until_there_are_enough_tokens(model, processor):
    rows = batches(processor)
    first = int(rows[0]["attention_mask"].sum())
    report = routing_report(model, processor, rows, max_tokens=first)
    assert sum(report.token_classes.values()) == first


def test_texts_alone_go_as_before(model, processor):
    texts = ["The river runs past the old mill."]
    report = routing_report(model, processor, texts)
    plain = routing_report(model, processor.tokenizer, texts)
    assert "image" not in report.token_classes
    assert [layer.load for layer in report.layers] == [layer.load for layer in plain.layers]
    assert len(report.layers) == len(moe_layers(model))
