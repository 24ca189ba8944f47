"""Conversion from folder to folder."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hf_moe import upcycle, upcycle_checkpoint
from hf_moe.checkpoints import CheckpointWriter
from hf_moe.upcycling import Drop, ImportanceShared, KMeans


@pytest.fixture
def source(tmp_path, tiny_llama_config):
    torch.manual_seed(0)
    folder = tmp_path / "dense"
    LlamaForCausalLM(tiny_llama_config).save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def ids():
    return torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("target", ["auto", "mixtral", "moe_llama", "generic"])
def test_the_result_loads_and_equals_the_dense_model(source, tmp_path, ids, target):
    report = upcycle_checkpoint(source, tmp_path / "moe", num_experts=4, top_k=2, target=target, max_shard_size=40_000)
    dense = LlamaForCausalLM.from_pretrained(source).eval()
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()
    torch.testing.assert_close(moe(ids).logits, dense(ids).logits, rtol=0, atol=1e-6)
    assert report.predicted_exact
    assert report.parameters == moe.num_parameters()
    assert moe.config.upcycling["target"] == report.target


def test_it_writes_the_weights_that_upcycle_makes(source, tmp_path):
    choices = {"num_experts": 4, "top_k": 2, "target": "moe_llama", "experts": Drop(0.5), "seed": 3}
    upcycle_checkpoint(source, tmp_path / "moe", **choices)
    in_memory, _ = upcycle(str(source), check=False, **choices)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").state_dict()
    for name, tensor in in_memory.state_dict().items():
        assert torch.equal(streamed[name], tensor), name


def test_tied_weights_are_written_once(tmp_path, ids):
    config = Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "dense")
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", num_experts=2, top_k=1, target="moe_qwen2")
    with safe_open(tmp_path / "moe" / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert moe.lm_head.weight is moe.model.embed_tokens.weight


def test_the_index_names_every_tensor_in_the_file_that_holds_it(source, tmp_path):
    upcycle_checkpoint(source, tmp_path / "moe", num_experts=4, top_k=2, target="moe_llama", max_shard_size=30_000)
    index = json.loads((tmp_path / "moe" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    for name in files:
        with safe_open(tmp_path / "moe" / name, framework="pt") as file:
            assert set(file.keys()) == {key for key, where in index["weight_map"].items() if where == name}


def test_no_more_than_a_shard_is_kept(source, tmp_path, monkeypatch):
    largest = 0
    add = CheckpointWriter.add

    def watch(self, key, tensor):
        nonlocal largest
        add(self, key, tensor)
        largest = max(largest, self._shard_bytes)

    monkeypatch.setattr(CheckpointWriter, "add", watch)
    upcycle_checkpoint(source, tmp_path / "moe", num_experts=4, top_k=2, target="moe_llama", max_shard_size=1)
    biggest = max(t.nbytes for t in AutoModelForCausalLM.from_pretrained(tmp_path / "moe").state_dict().values())
    assert largest == biggest


def test_recipes_that_need_data_are_sent_to_upcycle(source, tmp_path):
    for choice in ({"experts": ImportanceShared(8)}, {"router": KMeans()}, {"target": "moe_plus_plus"}):
        with pytest.raises(ValueError, match=r"looks at data.*use `hf_moe.upcycle`"):
            upcycle_checkpoint(source, tmp_path / "moe", num_experts=4, top_k=2, **choice)
    assert not (tmp_path / "moe").exists()


def test_a_truncated_shard_is_named_and_nothing_is_left(source, tmp_path):
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(ValueError, match=shard.name):
        upcycle_checkpoint(source, tmp_path / "moe", num_experts=4, top_k=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_a_folder_with_something_in_it_is_not_overwritten(source, tmp_path):
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        upcycle_checkpoint(source, tmp_path / "moe", num_experts=4, top_k=2)
    assert (tmp_path / "moe" / "notes.txt").read_text() == "mine"


def test_a_checkpoint_without_weights_says_what_to_do(source, tmp_path):
    for path in source.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        upcycle_checkpoint(source, tmp_path / "moe", num_experts=4, top_k=2)
