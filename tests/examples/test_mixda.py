import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[2] / "examples" / "mixda.py"
    spec = importlib.util.spec_from_file_location("mixda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny_bert(tmp_path, tiny_tokenizer):
    tiny_tokenizer.add_special_tokens({"mask_token": "<mask>"})
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tiny_tokenizer), pad_token_id=tiny_tokenizer.pad_token_id, **sizes)
    BertModel(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_both_stages_run_and_the_methods_are_compared(example, tiny_bert, tmp_path, capsys):
    options = "--domains licences --tasks licences --head-steps 2 --knowledge-steps 3 --task-steps 2 --length 16"
    out = tmp_path / "out"
    result = example.main(
        ["--model", str(tiny_bert), "--output", str(out), "--seeds", "0", "1", *options.split(), "--test", "4"]
    )
    assert [(row["method"], row["seed"]) for row in result["rows"]] == [
        (method, seed) for seed in (0, 1) for method in ("MixDA", "Pfeiffer", "LoRA", "full")
    ]
    for row in result["rows"]:
        assert 0 <= row["accuracy"] <= 1 and row["test"] <= 16
        assert set(row["gate"]) == ({"licences", ""} if row["method"] == "MixDA" else set())
    size = {row["method"]: row["trainable"] for row in result["rows"]}
    assert size["Pfeiffer"] < size["MixDA"] < size["full"] and 0.5 < size["LoRA"] / size["Pfeiffer"] < 2
    assert set(result["knowledge"]) == {"licences"}
    assert json.loads((out / "results.json").read_text())["rows"] == result["rows"]
    assert (out / "results.png").stat().st_size > 0
    assert (out / "results.md").read_text() in capsys.readouterr().out


def test_no_paragraph_of_a_task_was_trained_on(example):
    from hf_moe.corpora import load_corpus

    task = example.task_of("licences", 4)
    seen = " ".join(" ".join(text.split()) for text in load_corpus("licences").train)
    assert len(task) == 4 and not any(paragraph in seen for texts in task for paragraph in texts)


def test_few_examples_are_drawn_from_each_class(example):
    task = [[f"{label}, paragraph {i}" for i in range(size)] for label, size in enumerate((9, 20, 8, 30))]
    train, test = example.few_shot(task, 3, 5, seed=0)
    assert len(train) == 12 and {row["label"] for row in test} == {0, 1, 2, 3}
    assert not {row["text"] for row in train} & {row["text"] for row in test}
    assert example.few_shot(task, 3, 5, seed=1)[0] != train


def test_positions_that_are_not_hidden_are_not_scored(example, tiny_bert):
    from transformers import BertForMaskedLM

    torch.manual_seed(0)
    model = example.MaskedPositions.from_pretrained(tiny_bert).eval()
    plain = BertForMaskedLM(model.config).eval()
    plain.load_state_dict(model.state_dict())
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    labels = torch.tensor([[-100, 6, -100, -100], [9, -100, -100, 12]])
    with torch.no_grad():
        found, expected = model(input_ids=ids, labels=labels), plain(input_ids=ids, labels=labels)
    torch.testing.assert_close(found.loss, expected.loss)
    assert found.logits.shape[0] == 3
