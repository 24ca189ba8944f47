"""The loopback Hub behaves like the Hub where our tests lean on it."""

import json

from common.card_rules import card_errors


def test_a_model_and_its_tokenizer_survive_push_and_load(hub, run_python, tmp_path, tiny_tokenizer_dir):
    code = f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM
model = MixtralForCausalLM(MixtralConfig(vocab_size=384, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)).eval()
tokenizer = AutoTokenizer.from_pretrained({str(tiny_tokenizer_dir)!r})
model.push_to_hub("me/tiny"); tokenizer.push_to_hub("me/tiny")
ids = AutoTokenizer.from_pretrained("me/tiny")("The river", return_tensors="pt")
loaded = AutoModelForCausalLM.from_pretrained("me/tiny").eval()
assert torch.equal(loaded(**ids).logits, model(**ids).logits)
"""
    result = run_python(code, env=hub.environment(tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files("me/tiny"))
    assert json.loads(hub.files("me/tiny")["config.json"])["model_type"] == "mixtral"


def test_a_data_set_survives_push_and_load(hub, run_python, tmp_path):
    code = """
from datasets import Dataset, load_dataset
Dataset.from_dict({"text": ["a", "b"]}).push_to_hub("me/data")
assert load_dataset("me/data", split="train")["text"][:] == ["a", "b"]
"""
    result = run_python(code, env=hub.environment(tmp_path / "home"))
    assert result.returncode == 0, result.stderr


def test_what_does_not_exist_is_said_as_the_hub_says_it(hub, run_python, tmp_path):
    code = """
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
api = HfApi()
api.create_repo("me/empty"); api.create_repo("me/empty", exist_ok=True)
for call, error in [
    (lambda: hf_hub_download("me/absent", "x"), RepositoryNotFoundError),
    (lambda: hf_hub_download("me/empty", "x"), EntryNotFoundError),
    (lambda: hf_hub_download("me/empty", "x", revision="v2"), RevisionNotFoundError),
]:
    try:
        call()
    except error:
        print("ok")
"""
    result = run_python(code, env=hub.environment(tmp_path / "home"))
    assert result.stdout.split() == ["ok"] * 3, result.stderr


def test_a_file_can_be_deleted_and_the_old_commit_still_has_it(hub, run_python, tmp_path):
    code = """
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
api = HfApi()
api.create_repo("me/repo")
first = api.upload_file(path_or_fileobj=b"one", path_in_repo="folder/a.txt", repo_id="me/repo").oid
api.delete_file("folder/a.txt", "me/repo")
assert api.list_repo_files("me/repo") == []
print(open(hf_hub_download("me/repo", "folder/a.txt", revision=first)).read())
"""
    result = run_python(code, env=hub.environment(tmp_path / "home"))
    assert result.stdout.split() == ["one"], result.stderr


def test_card_rules_accept_a_valid_card_and_name_each_violation():
    assert card_errors("---\nlicense: mit\nbase_model: me/a\ntags: [moe]\n---\n# x") == []
    assert card_errors("# x") == ["the card has no metadata block"]
    broken = "---\nlicense: nope\nbase_model: no id\npipeline_tag: cooking\ntags: moe\nmodel-index: []\n---\n"
    assert len(card_errors(broken)) == 5
    index = "---\nmodel-index:\n- name: x\n  results:\n  - task: {type: text-generation}\n    metrics: [{type: ppl}]\n"
    assert len(card_errors(index + "---\n")) == 3
