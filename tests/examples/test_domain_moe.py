import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[2] / "examples" / "domain_moe.py"
    spec = importlib.util.spec_from_file_location("domain_moe", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["domain_moe"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["domain_moe"]


def test_every_answer_follows_from_the_equations_of_its_reasoning(example):
    for problem in example.word_problems(3, 200):
        equations = [equation.split("=") for equation in problem.reasoning.rstrip(".").split(". ")]
        assert len(equations) == problem.steps
        for left, right in equations:
            assert eval(left) == int(right)
        assert int(equations[-1][1]) == problem.answer == example.answer_in(problem.text)
        assert problem.answer >= 0


def test_no_equations_of_a_test_problem_occur_in_a_training_problem(example):
    train = {problem.reasoning for seed in range(3) for problem in example.word_problems(seed, 500)}
    test = {problem.reasoning for seed in range(3) for problem in example.word_problems(seed, 100, "test")}
    assert test
    assert not train & test


def test_the_same_seed_gives_the_same_problems_and_another_seed_others(example):
    assert example.word_problems(0, 20) == example.word_problems(0, 20)
    assert example.word_problems(0, 20) != example.word_problems(1, 20)
    assert [p.steps for p in example.word_problems(0, 4)] == [1, 2, 1, 2]
    assert {p.steps for p in example.word_problems(0, 9, steps=2)} == {2}
    with pytest.raises(ValueError, match="`split` must be 'train' or 'test', got 'valid'"):
        example.word_problems(0, 1, "valid")


@pytest.mark.parametrize(
    ("text", "answer"),
    [("3 + 4 = 7.\nAnswer: 7\n", 7), ("Answer: 12 apples Answer: 3", 12), ("the answer is 5", None)],
)
def test_the_first_answer_line_counts(example, text, answer):
    assert example.answer_in(text) == answer


def test_the_shift_between_loads_is_the_share_that_moves(example):
    assert example.load_shift([[0.5, 0.5]], [[0.5, 0.5]]) == 0
    assert example.load_shift([[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.75, 0.25]]) == pytest.approx(0.625)


@pytest.fixture(scope="module")
def tiny(example, tiny_tokenizer_dir):
    """Arguments of `load_or_train` for a random model of two layers and a few lines of text."""
    from transformers import AutoTokenizer, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    settings = example.Settings(
        num_experts=4,
        layers=(1,),
        train_from=1,
        steps=12,
        batch_size=4,
        length=32,
        learning_rate=1e-2,
        held_out_blocks=2,
        problems=4,
    )
    problems = [problem.text for problem in example.word_problems(0, 30)]
    rivers = [f"The river number {i} runs past the old mill and down to the sea." for i in range(30)]
    texts = {"rivers": (rivers, rivers[:5]), "arithmetic": (problems, problems[:5])}
    return {
        "settings": settings,
        "source": (LlamaForCausalLM(config), AutoTokenizer.from_pretrained(tiny_tokenizer_dir)),
        "texts": texts,
    }


def test_a_checkpoint_is_trained_once_and_then_reloaded(example, tiny, tmp_path, monkeypatch):
    model, tokenizer, info = example.load_or_train(tmp_path, seed=3, **tiny)
    assert all(info["after"]["perplexity"][name] < info["before"]["perplexity"][name] for name in tiny["texts"])
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}

    def refuse(*_args, **_kwargs):
        raise AssertionError("trained a second time")

    monkeypatch.setattr(example, "train_from_dense", refuse)
    again, _, same = example.load_or_train(tmp_path, seed=3, **tiny)
    assert same == info
    ids = tokenizer("The river", return_tensors="pt")["input_ids"]
    assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(AssertionError, match="second time"):
        example.load_or_train(tmp_path, seed=4, **tiny)  # another seed is another checkpoint


def test_layers_below_the_trained_ones_stay_those_of_the_dense_model(example, tiny, tmp_path):
    model, _, _ = example.load_or_train(tmp_path, **tiny)
    dense = tiny["source"][0].model
    for name, parameter in dense.layers[0].named_parameters():
        kept = model.model.layers[0].get_parameter(name)
        torch.testing.assert_close(kept, parameter.bfloat16().float(), rtol=0, atol=0)
    assert not torch.equal(model.model.layers[1].self_attn.q_proj.weight, dense.layers[1].self_attn.q_proj.weight)


def test_the_table_the_plot_and_the_figures_are_written(example, tiny, tmp_path, capsys):
    infos = example.main(["--seeds", "0", "1", "--output", str(tmp_path)], **tiny)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["runs"] == infos
    assert written["shift"]["0"]["rivers"]["rivers"] == 0
    table = (tmp_path / "results.md").read_text()
    assert "| perplexity, rivers |" in table
    assert "| problems of 2 step(s) solved |" in table
    assert table in capsys.readouterr().out
    assert (tmp_path / "load-seed1.png").stat().st_size > 0


def test_an_unknown_preset_is_refused(example, tmp_path):
    with pytest.raises(ValueError, match="`preset` must be one of short, full, got 'long'"):
        example.load_or_train(tmp_path, "long")
