"""`hf-moe upcycle`."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from hf_moe.cli import main


@pytest.fixture
def source(tmp_path, tiny_llama_config, tiny_tokenizer):
    torch.manual_seed(0)
    folder = tmp_path / "dense"
    LlamaForCausalLM(tiny_llama_config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", [[], ["--stream"], ["--target", "moe_llama", "--recipe", "copy"]])
def test_a_folder_becomes_a_moe_folder(source, tmp_path, capsys, options):
    target = tmp_path / "moe"
    assert main(["upcycle", str(source), str(target), "--experts", "4", "--top-k", "2", *options]) == 0
    assert "the same function as the dense model" in capsys.readouterr().out
    ids = AutoTokenizer.from_pretrained(target)("The river runs", return_tensors="pt").input_ids
    dense = LlamaForCausalLM.from_pretrained(source).eval()
    moe = AutoModelForCausalLM.from_pretrained(target).eval()
    torch.testing.assert_close(moe(ids).logits, dense(ids).logits, rtol=0, atol=1e-6)
    assert json.loads((target / "upcycling.json").read_text())["num_experts"] == 4


def test_recipes_take_a_value(source, tmp_path):
    assert main(["upcycle", str(source), str(tmp_path / "moe"), "--experts", "4", "--recipe", "drop:0.25"]) == 0
    recipe = json.loads((tmp_path / "moe" / "upcycling.json").read_text())["recipe"]["experts"]
    assert recipe["name"] == "Drop"
    assert 0.25 in recipe.values()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-k", "9"], "`top_k` must be between 1 and `num_experts` (8), got 9"),
        (["--layers", "7"], "use indices from 0 to 1"),
        (["--recipe", "magic"], "`--recipe magic` is not known"),
        (["--recipe", "drop:much"], "`--recipe drop:much`"),
        (["--shared", "some"], "`--shared` must be dense, residual or a number"),
        (["--target", "mixtrall"], "Did you mean 'mixtral'?"),
        (["--stream", "--dtype", "bfloat16"], "`--stream` takes a checkpoint as it is"),
    ],
)
def test_bad_options_get_one_sentence_and_leave_nothing(source, tmp_path, capsys, options, message):
    assert main(["upcycle", str(source), str(tmp_path / "moe"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.strip().count("\n") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_a_destination_in_use_is_refused(source, tmp_path, capsys):
    assert main(["upcycle", str(source), str(source)]) == 2
    assert "exists already" in capsys.readouterr().err
