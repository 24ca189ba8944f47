"""`hf-moe inspect`: what it writes, and that bad input is one sentence before anything is written."""

import argparse
import json

import pytest
from common.tiny_families import tiny_model

from hf_moe.cli import main
from hf_moe.reporting import command


TEXT = "The river runs past the old mill.\n\nA miller kept three cats,\nand the cats kept the mice away.\n"


@pytest.fixture
def folder(tmp_path, tiny_tokenizer):
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def inspect(folder, *extra, model="model", text="text.txt"):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    paths = [str(folder / model), "--text", str(folder / text), "--output", str(folder / "report")]
    return command.run(parser.parse_args([*paths, "--device", "cpu", *extra]))


def test_inspect_writes_the_report_and_prints_its_table(folder, capsys):
    assert inspect(folder, "--max-tokens", "20", "--batch-size", "1") == 0
    content = json.loads((folder / "report" / "report.json").read_text())
    assert content["model_name"] == "model" and content["num_tokens"] == 20
    printed = capsys.readouterr().out
    assert "| model.layers.0.mlp | 8 |" in printed and "report.md" in printed


def test_paragraphs_are_texts(folder):
    texts = list(command.read_texts(str(folder / "text.txt")))
    assert texts == [
        "The river runs past the old mill.\n",
        "A miller kept three cats,\nand the cats kept the mice away.\n",
    ]


def test_a_file_without_line_breaks_is_read_in_parts(tmp_path):
    (tmp_path / "long.txt").write_text("word " * 20_000)
    texts = list(command.read_texts(str(tmp_path / "long.txt")))
    assert max(map(len, texts)) <= 2 * command.LONGEST_TEXT and "".join(texts) == "word " * 20_000


@pytest.mark.parametrize(
    "content,error,message",
    [
        (b"", ValueError, r"`--text` .*text.txt' is empty"),
        (b" \n\n\t\n", ValueError, r"`--text` .*text.txt' is empty"),
        (b"\xff\xfe\x00caf\xe9", ValueError, r"`--text` .*text.txt' is not UTF-8"),
    ],
    ids=["empty", "blank", "binary"],
)
def test_bad_texts_are_refused(folder, content, error, message):
    (folder / "text.txt").write_bytes(content)
    with pytest.raises(error, match=message):
        inspect(folder)
    assert not (folder / "report").exists()


def test_a_missing_text_is_refused(folder):
    with pytest.raises(OSError, match=r"nothing.txt' is not a file"):
        inspect(folder, text="nothing.txt")


def test_a_missing_model_is_refused(folder):
    with pytest.raises(OSError, match=r"MODEL .*nowhere' is not a folder"):
        inspect(folder, model="nowhere")
    assert not (folder / "report").exists()


def test_the_shell_command_ends_with_one_sentence_and_a_code(folder, capsys):
    (folder / "text.txt").write_text("")
    output = folder / "report"
    words = ["inspect", str(folder / "model"), "--text", str(folder / "text.txt"), "--output", str(output)]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "text.txt' is empty" in error
    assert not output.exists()


def test_a_dense_model_is_refused(folder, tiny_llama):
    tiny_llama.save_pretrained(folder / "model")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM\) has no MoE layer"):
        inspect(folder)
    assert not (folder / "report").exists()


def test_a_foreign_tokenizer_is_refused(folder):
    tiny_model("mixtral", vocab_size=200).save_pretrained(folder / "model")
    with pytest.raises(ValueError, match="`tokenizer` has 384 ids but the model embeds 200"):
        inspect(folder)
    assert not (folder / "report").exists()


def test_a_missing_tokenizer_is_refused(folder):
    tiny_model("mixtral").save_pretrained(folder / "bare")
    with pytest.raises(ValueError, match=r"bare' has no tokenizer that can be loaded"):
        inspect(folder, model="bare")


def test_an_unwritable_output_is_refused_before_the_model_is_loaded(folder):
    (folder / "report").write_text("a file")
    with pytest.raises(OSError, match="cannot be a folder"):
        inspect(folder, model="nowhere")
    assert (folder / "report").read_text() == "a file"


@pytest.mark.parametrize("option", ["--max-tokens", "--batch-size"])
def test_numbers_below_one_are_refused(folder, option):
    with pytest.raises(ValueError, match=f"`{option}` must be at least 1, got 0"):
        inspect(folder, option, "0")


def test_an_unknown_device_is_refused(folder):
    with pytest.raises(ValueError, match="`--device` 'abacus' cannot be used"):
        inspect(folder, "--device", "abacus")
