import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from hf_moe.cli import main
from hf_moe.quickstart import command


def read_results(output):
    return json.loads((output / "results.json").read_text())


def test_a_run_leaves_model_report_card_and_results(finished):
    output, code = finished
    assert code == 0
    assert sorted(os.listdir(output)) == ["model", "report", "results.json"]
    model_files = {"config.json", "model.safetensors", "tokenizer.json", "README.md", "expert_load.png"}
    assert model_files <= set(os.listdir(output / "model"))
    assert {"report.md", "report.json", "expert_load.png"} <= set(os.listdir(output / "report"))
    assert (output / "model" / "expert_load.png").read_bytes().startswith(b"\x89PNG")


def test_the_results_say_what_was_measured(finished):
    results = read_results(finished[0])
    assert set(results["perplexity"]) == {"dense", "before", "after"}
    assert all(1 < value < 1000 for value in results["perplexity"].values())
    assert results["reload_max_logit_difference"] <= 1e-6
    assert results["layers"] == [1]
    assert math.isfinite(results["training"]["last_loss"])
    assert results["below_dense"] == (results["perplexity"]["after"] < results["perplexity"]["dense"])


def test_the_saved_model_is_a_moe_plus_plus_model_that_generates(finished):
    model = AutoModelForCausalLM.from_pretrained(finished[0] / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished[0] / "model")
    assert model.config.model_type == "moe_plus_plus"
    assert model.config.moe_layer_indices == [1]
    inputs = tokenizer("The river", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert output.shape[1] > inputs.input_ids.shape[1]


def test_the_start_is_close_to_the_dense_model(finished):
    perplexity = read_results(finished[0])["perplexity"]
    assert perplexity["before"] == pytest.approx(perplexity["dense"], rel=0.01)


def test_training_changes_only_the_moe_blocks(finished, dense_dir):
    state = AutoModelForCausalLM.from_pretrained(finished[0] / "model").state_dict()
    dense = AutoModelForCausalLM.from_pretrained(dense_dir).state_dict()
    assert [n for n, w in dense.items() if n in state and not torch.equal(w, state[n])] == []
    experts = state["model.layers.1.mlp.experts.down_proj"]
    assert not torch.equal(experts[0], experts[1])


def test_the_card_carries_base_model_settings_and_perplexities(finished):
    card = (finished[0] / "model" / "README.md").read_text()
    results = read_results(finished[0])
    assert f"{results['perplexity']['after']:.4g}" in card
    assert f"{results['perplexity']['dense']:.4g}" in card
    assert "![" in card
    assert str(finished[0].parent) not in card


def test_a_finished_run_says_where_everything_is(small, tmp_path, capsys):
    assert main(small) == 0
    printed = capsys.readouterr().out
    assert "Held-out perplexity" in printed
    assert str(tmp_path / "out" / "model") in printed


def test_a_family_moe_plus_plus_is_not_made_from_becomes_another_moe(small, tiny_tokenizer, tmp_path):
    config = GPT2Config(
        vocab_size=384, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    assert main([*small, "--model", str(tmp_path / "gpt2")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert model.config.model_type == "moe_gpt2"


def test_the_same_seed_gives_the_same_model(finished, small, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("of an older run")
    assert main([*small, "--overwrite"]) == 0
    again = tmp_path / "out" / "model" / "model.safetensors"
    assert again.read_bytes() == (finished[0] / "model" / "model.safetensors").read_bytes()


def test_the_users_text_is_what_is_trained_on(small, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text(
        "\n\n".join(f"The miller kept {number} cats, and the cats kept the mice away." for number in range(60))
    )
    words = [word for word in small if word not in ("--domain", "reference")]
    assert main([*words, "--text", str(text)]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["text"] == "mine.txt"
    assert "mine.txt" in (tmp_path / "out" / "model" / "README.md").read_text()


BAD_INPUT = {
    "empty text": (["--text", "{tmp}/empty.txt"], "is empty"),
    "no such model": (["--model", "{tmp}/nowhere"], "is not a folder"),
    "output below a file": (["--output", "{tmp}/empty.txt/out"], "cannot be written"),
    "too many layers": (["--layers", "3"], "`--layers` must be at most 2"),
    "more experts per token than experts": (["--top-k", "99"], "99"),
    "truncated weights": (["--model", "{tmp}/dense"], "truncated or corrupt"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gives_one_sentence_and_no_output(case, small, dense_dir, tmp_path, capsys):
    words, message = BAD_INPUT[case]
    words = [word.format(tmp=tmp_path) for word in words]
    (tmp_path / "empty.txt").write_text("")
    if case == "truncated weights":
        shutil.copytree(dense_dir, tmp_path / "dense")
        path = tmp_path / "dense" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
    if "--text" in words:
        small = [word for word in small if word not in ("--domain", "reference")]
    assert main([*small, *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hf-moe: error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", ["tell_story", "check_space", "write_report", "write_card", "reload", "generate"])
def test_an_interrupt_at_any_step_leaves_nothing(step, small, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, step, interrupted)
    assert main(small) == 130
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_reload_is_not_left_behind(small, tmp_path, monkeypatch, capsys):
    original = command.reload

    def damaged(folder, model, blocks):
        with torch.no_grad():
            model.lm_head.weight[5] += 1
        return original(folder, model, blocks)

    monkeypatch.setattr(command, "reload", damaged)
    assert main(small) == 2
    assert "logits differ" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_while_training_exits_130_and_leaves_nothing(small, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_moe.cli", *small, "--steps", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
    )
    try:
        for line in process.stdout:
            if line.startswith("[3/5]"):
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert not (tmp_path / "out").exists()
