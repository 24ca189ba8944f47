import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_moe import SelfContrast


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    yield importlib.import_module("self_contrast")
    for name in ("self_contrast", "domain_moe"):
        sys.modules.pop(name, None)


def tiny_dense(seed=0):
    sizes = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            **sizes, num_attention_heads=2, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0
        )
        return LlamaForCausalLM(config).eval()


@pytest.fixture
def toy(example, tiny_tokenizer_dir):
    import domain_moe

    lines = [problem.text for problem in domain_moe.word_problems(0, 20)]
    return {
        "source": (tiny_dense(), AutoTokenizer.from_pretrained(tiny_tokenizer_dir)),
        "texts": {"arithmetic": (lines, lines[:5])},
        "settings": domain_moe.Settings(
            num_experts=4, layers=(1,), train_from=1, steps=2, length=16, held_out_blocks=1, problems=2
        ),
    }


def test_every_method_answers_and_finished_runs_are_not_repeated(example, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "MAX_NEW_TOKENS", 4)
    words = ["--models", str(tmp_path / "models"), "--output", str(tmp_path / "out"), "--dtype", "float32"]
    words += ["--sets", "2", "--problems", "4", "--timed", "1", "--batch-size", "2"]
    rows = example.main(words, **toy)
    assert [row["method"] for row in rows] == list(example.METHODS)
    for row in rows:
        assert len(row["accuracy"]) == 2 and row["latency"] > 0
    assert rows[0]["difference"] == [0, 0] and rows[0]["latency"] == 1
    table = (tmp_path / "out" / "results.md").read_text()
    assert table in capsys.readouterr().out and all(f"| {name} |" in table for name in example.METHODS)
    assert (tmp_path / "out" / "results.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == rows
    monkeypatch.setattr(example, "answer", None)
    monkeypatch.setattr(example, "latencies", None)
    assert example.main(words, **toy) == rows


def test_the_amateur_says_what_it_says_without_cache(example):
    model, amateur = tiny_dense(0), tiny_dense(1)
    ids = torch.randint(3, 384, (2, 6), generator=torch.Generator().manual_seed(0))
    ids[0, :2] = 0  # padding
    mask = (ids != 0).long()
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None, output_logits=True,
        return_dict_in_generate=True, output_scores=True, logits_processor=[example.Amateur(amateur, 0.7, 0)],
    )  # fmt: skip
    decoder = SelfContrast(beta=0.7)
    for step in range(5):
        alone = [amateur(row[row_mask.sum() * 0 + skip :][None, : 6 - skip + step]).logits[:, -1]
                 for row, row_mask, skip in zip(output.sequences, mask, (2, 0), strict=True)]  # fmt: skip
        expected = decoder.contrast(output.logits[step], torch.cat(alone))
        torch.testing.assert_close(output.scores[step], expected, atol=1e-5, rtol=1e-5)


def test_a_text_ends_after_its_answer_line(example, tiny_tokenizer):
    tiny_tokenizer.padding_side = "left"
    texts = ["Answer: 12\n", "3 + 4 = 7.\n", "Answer: 1"]
    ids = tiny_tokenizer(texts, return_tensors="pt", padding=True)["input_ids"]
    assert example.Answered(tiny_tokenizer, 0)(ids, None).tolist() == [True, False, False]


def test_wider_routing_is_left_after_answering(example):
    from common.tiny_families import tiny_model

    model = tiny_model("mixtral")
    with example.METHODS["4 experts"].routing(model):
        assert any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
