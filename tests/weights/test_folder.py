import json
import shutil

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaModel, T5Config, T5ForConditionalGeneration

from hf_moe.weights import check_safetensors, load_folder


def test_a_saved_model_loads_with_its_weights(tiny_dense_dir, tiny_llama):
    model, tokenizer = load_folder(tiny_dense_dir)
    assert not model.training
    assert len(tokenizer) == 384
    for name, weight in tiny_llama.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


def test_dtype_is_the_loaded_dtype(tiny_dense_dir):
    assert load_folder(tiny_dense_dir, torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_tokenizer_without_padding_pads_with_the_end_token(tiny_dense_dir, tiny_tokenizer):
    tiny_tokenizer.pad_token = None
    tiny_tokenizer.save_pretrained(tiny_dense_dir)
    assert load_folder(tiny_dense_dir)[1].pad_token == "</s>"


def test_intact_files_are_listed(tiny_dense_dir):
    assert check_safetensors(tiny_dense_dir) == ["model.safetensors"]


@pytest.mark.parametrize("keep", [0, 4, 100, -8])
def test_a_truncated_file_is_named_with_the_fix(tiny_dense_dir, keep):
    path = tiny_dense_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors` .*truncated or corrupt.*Download or copy"):
        load_folder(tiny_dense_dir)


def test_a_file_that_is_something_else_is_named(tiny_dense_dir):
    (tiny_dense_dir / "model.safetensors").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(ValueError, match=r"model\.safetensors` .*truncated or corrupt"):
        load_folder(tiny_dense_dir)


def test_a_missing_shard_is_named(tiny_llama, tiny_tokenizer, tmp_path):
    tiny_llama.save_pretrained(tmp_path, max_shard_size="40KB")
    tiny_tokenizer.save_pretrained(tmp_path)
    shards = check_safetensors(tmp_path)
    assert len(shards) > 1
    (tmp_path / shards[-1]).unlink()
    with pytest.raises(ValueError, match=f"{shards[-1]}` is missing"):
        load_folder(tmp_path)


def test_a_broken_index_is_named(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path, max_shard_size="40KB")
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a weight index"):
        check_safetensors(tmp_path)


def test_missing_tensors_are_not_made_up(tiny_dense_dir, tiny_llama_config):
    config = json.loads((tiny_dense_dir / "config.json").read_text())
    (tiny_dense_dir / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"lack \d+ tensors of LlamaForCausalLM, first `model\.layers\.2"):
        load_folder(tiny_dense_dir)


def test_weights_of_another_size_are_refused(tiny_dense_dir):
    config = json.loads((tiny_dense_dir / "config.json").read_text())
    (tiny_dense_dir / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_folder(tiny_dense_dir)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tiny_dense_dir, tiny_tokenizer):
    tiny_tokenizer.add_tokens(["<one>", "<more>"])
    tiny_tokenizer.save_pretrained(tiny_dense_dir)
    with pytest.raises(ValueError, match=r"has 386 tokens but the model only 384 embeddings.*own tokenizer"):
        load_folder(tiny_dense_dir)


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_an_unusable_tokenizer_names_the_files(tiny_dense_dir, content):
    path = tiny_dense_dir / "tokenizer.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match="tokenizer"):
        load_folder(tiny_dense_dir)


def test_a_masked_language_model_is_refused(tmp_path):
    config = BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`BertForMaskedLM`, which is not a causal language model"):
        load_folder(tmp_path)


def test_an_encoder_decoder_is_refused(tmp_path):
    config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a causal language model"):
        load_folder(tmp_path)


def test_a_bare_decoder_is_refused(tiny_llama_config, tmp_path):
    LlamaModel(tiny_llama_config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`LlamaModel`, which is not a causal language model"):
        load_folder(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere` is not a folder"):
        load_folder(tmp_path / "nowhere")


@pytest.mark.parametrize(("content", "message"), [(None, r"no `config\.json`"), ("{", "cannot be read")])
def test_an_unusable_config_is_named(tiny_dense_dir, content, message):
    path = tiny_dense_dir / "config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_folder(tiny_dense_dir)


def test_an_unknown_model_type_is_named(tiny_dense_dir):
    (tiny_dense_dir / "config.json").write_text('{"model_type": "not_a_model"}')
    with pytest.raises(ValueError, match="not_a_model"):
        load_folder(tiny_dense_dir)


def test_the_tilde_is_the_home_folder(tiny_dense_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.move(tiny_dense_dir, tmp_path / "model")
    assert load_folder("~/model")[0].config.num_hidden_layers == 2
