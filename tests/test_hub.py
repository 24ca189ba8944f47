"""Shim and push: what a pushed repository needs on the machine that loads it."""

import base64
import json

import pytest
import torch
from common.card_rules import card_errors
from common.hub_server import HubServer
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_moe.hub import SHIM_FILE, attach_shim, check_tokenizer, push_to_hub, shim_auto_map, write_shim
from hf_moe.models.llama import MoeLlamaConfig, MoeLlamaForCausalLM


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_moe":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
"""
LOGITS = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("me/moe"{flag})
model = AutoModelForCausalLM.from_pretrained("me/moe"{flag}).eval()
with torch.no_grad():
    logits = model(**tokenizer("The river runs", return_tensors="pt")).logits
assert type(model).__module__.startswith("hf_moe.models.llama"), type(model)
print(f"{{logits.double().sum().item():.9f}}")
"""


def make_config():
    return MoeLlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
    )


def make_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MoeLlamaForCausalLM(make_config()).eval()


@pytest.fixture
def config():
    return make_config()


@pytest.fixture
def model():
    return make_model()


def test_the_shim_is_one_import_line_and_every_auto_class_finds_its_class(config, tmp_path):
    path = write_shim(tmp_path, config)
    text = path.read_text()
    assert text.startswith("from hf_moe.models.llama import MoeLlamaConfig, MoeLlamaForCausalLM")
    assert text.count("\n") == 1
    namespace = {}
    exec(text, namespace)
    assert config.auto_map == shim_auto_map(config)
    assert set(config.auto_map) == {
        "AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
    }  # fmt: skip
    for reference in config.auto_map.values():
        module, name = reference.split(".")
        assert module == SHIM_FILE.removesuffix(".py") and name in namespace


def test_a_native_type_needs_no_shim(tmp_path):
    assert write_shim(tmp_path, MixtralConfig()) is None
    assert list(tmp_path.iterdir()) == []


def test_save_pretrained_writes_the_shim_by_default_and_none_removes_it(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert (tmp_path / SHIM_FILE).is_file()
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == shim_auto_map(model.config)
    model.save_pretrained(tmp_path, code=None)
    assert not (tmp_path / SHIM_FILE).exists()
    assert not json.loads((tmp_path / "config.json").read_text()).get("auto_map")


def test_a_checkpoint_with_shim_loads_without_prompt_where_hf_moe_is_imported(model, tmp_path):
    model.save_pretrained(tmp_path)
    for flag in ({}, {"trust_remote_code": True}, {"trust_remote_code": False}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **flag)
        assert type(loaded) is MoeLlamaForCausalLM
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_saving_what_was_loaded_through_the_shim_copies_no_code(model, run_python, tmp_path):
    model.save_pretrained(tmp_path / "first")
    code = f"""
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "first")!r}, trust_remote_code=True)
model.save_pretrained({str(tmp_path / "second")!r})
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    for name in ("config.json", SHIM_FILE):
        assert (tmp_path / "second" / name).read_text() == (tmp_path / "first" / name).read_text()
    assert [path.name for path in (tmp_path / "second").glob("*.py")] == [SHIM_FILE]


def test_unknown_code_and_a_file_as_folder_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="`code` must be \"shim\" or None, got 'copy'"):
        attach_shim(model, tmp_path, code="copy")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="`save_directory` must be a folder"):
        model.save_pretrained(tmp_path / "file")


def test_classes_of_a_script_cannot_have_a_shim(config, tmp_path, monkeypatch):
    monkeypatch.setattr(type(config), "__module__", "__main__")
    with pytest.raises(ValueError, match="`MoeLlamaConfig` is defined in a script"):
        write_shim(tmp_path, config)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_does_not_fit_is_refused(model, tiny_tokenizer):
    check_tokenizer(model, tiny_tokenizer)
    tiny_tokenizer.add_tokens(["<one>", "<more>"])
    with pytest.raises(ValueError, match=r"`tokenizer` has 386 entries .* embeddings for 384"):
        check_tokenizer(model, tiny_tokenizer)


def test_missing_files_are_named_before_anything_is_pushed(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`files` names .*absent\.png"):
        push_to_hub(model, "me/moe", files=[tmp_path / "absent.png"])


@pytest.fixture(scope="module")
def pushed(run_python, tmp_path_factory, tiny_tokenizer_dir):
    """The loopback Hub with `me/moe` on it, and a function that runs code against it."""
    folder = tmp_path_factory.mktemp("pushed")
    make_model().save_pretrained(folder / "local")
    code = f"""
import hf_moe
from hf_moe.hub import push_to_hub
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(folder / "local")!r})
push_to_hub(model, "me/moe", tokenizer=AutoTokenizer.from_pretrained({str(tiny_tokenizer_dir)!r}))
model.push_to_hub("me/method")
"""
    with HubServer() as hub:
        result = run_python(code, env=hub.environment(folder / "home"))
        assert result.returncode == 0, result.stderr
        yield hub, lambda code: run_python(code, env=hub.environment(folder / "other-home"))


def copy_repo(hub, name):
    hub.create(name)
    for path, data in hub.files("me/moe").items():
        hub.commit(name, [{"key": "file", "value": {"path": path, "content": base64.b64encode(data)}}])


def test_a_push_is_one_commit_of_model_tokenizer_valid_card_and_shim(pushed):
    hub, _ = pushed
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", SHIM_FILE} <= set(hub.files("me/moe"))
    assert card_errors(hub.files("me/moe")["README.md"].decode()) == []
    assert sum(" /api/models/me/moe/commit/" in request for request in hub.requests) == 1


def test_the_method_of_the_model_pushes_weights_shim_and_a_valid_card_too(pushed):
    files = pushed[0].files("me/method")
    assert files["config.json"] == pushed[0].files("me/moe")["config.json"]
    assert files[SHIM_FILE] == pushed[0].files("me/moe")[SHIM_FILE]
    assert files["model.safetensors"] == pushed[0].files("me/moe")["model.safetensors"]
    assert card_errors(files["README.md"].decode()) == []


@pytest.mark.parametrize(("first", "flag"), [("import hf_moe", ""), ("", ", trust_remote_code=True")])
def test_a_pushed_model_loads_imported_or_with_the_flag(pushed, model, tiny_tokenizer, first, flag):
    with torch.no_grad():
        logits = model(**tiny_tokenizer("The river runs", return_tensors="pt")).logits
    result = pushed[1](first + LOGITS.format(flag=flag))
    assert result.stdout.strip() == f"{logits.double().sum().item():.9f}", result.stderr


def test_where_the_plugin_is_absent_the_error_says_what_to_install(pushed):
    result = pushed[1](BLOCKED + LOGITS.format(flag=", trust_remote_code=True"))
    assert result.returncode == 1
    assert "Run `pip install hf_moe`" in result.stderr.splitlines()[-1]


def test_a_second_push_leaves_no_stale_weights_and_keeps_an_edited_card(pushed, tmp_path):
    hub, run = pushed
    copy_repo(hub, "me/twice")
    hub.commit("me/twice", [{"key": "file", "value": {"path": "README.md", "content": "IyBtaW5l"}}])  # "# mine"
    code = f"""
import hf_moe
from hf_moe.hub import push_to_hub
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("me/twice")
push_to_hub(model, "me/twice", max_shard_size="20KB", code=None)
push_to_hub(model, "me/twice", revision="v2", files=[{str(tmp_path / "plot.png")!r}])
"""
    (tmp_path / "plot.png").write_bytes(b"png")
    result = run(code)
    assert result.returncode == 0, result.stderr
    files = hub.files("me/twice")
    assert "model.safetensors" not in files and "model.safetensors.index.json" in files
    assert SHIM_FILE not in files and not json.loads(files["config.json"]).get("auto_map")
    assert files["README.md"] == b"# mine"
    files = hub.files("me/twice", revision="v2")
    assert files["plot.png"] == b"png" and "model.safetensors" in files and SHIM_FILE in files


def test_an_adapter_is_pushed_beside_the_model_it_belongs_to(pushed):
    hub, run = pushed
    copy_repo(hub, "me/with-adapter")
    before = set(hub.files("me/with-adapter"))
    code = """
import hf_moe, torch
from hf_moe.hub import push_to_hub
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("me/with-adapter").eval()
adapter = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
push_to_hub(adapter, "me/with-adapter")
push_to_hub(adapter, "me/adapter")
ids = torch.arange(5)[None]
with torch.no_grad():
    expected = adapter(ids).logits
    for repo in ("me/with-adapter", "me/adapter"):
        loaded = AutoModelForCausalLM.from_pretrained(repo).eval()
        torch.testing.assert_close(loaded(ids).logits, expected)
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    added = {"adapter_config.json", "adapter_model.safetensors"}
    assert set(hub.files("me/with-adapter")) == before | added
    assert b"base_model: me/with-adapter" in hub.files("me/adapter")["README.md"]


def test_a_native_model_is_pushed_without_shim(hub, run_python, tmp_path):
    MixtralForCausalLM(
        MixtralConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                      num_key_value_heads=1, num_local_experts=2)
    ).save_pretrained(tmp_path / "mixtral")  # fmt: skip
    code = f"""
from hf_moe.hub import push_to_hub
from transformers import AutoModelForCausalLM
push_to_hub(AutoModelForCausalLM.from_pretrained({str(tmp_path / "mixtral")!r}), "native")
"""
    result = run_python(code, env=hub.environment(tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    assert SHIM_FILE not in hub.files("me/native")
    result = run_python(
        BLOCKED + "from transformers import AutoModelForCausalLM as A; print(type(A.from_pretrained('me/native')))",
        env=hub.environment(tmp_path / "home"),
    )
    assert "MixtralForCausalLM" in result.stdout, result.stderr


def test_the_config_alone_loads_through_the_shim(model, run_python, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    code = f"""
from transformers import AutoConfig
config = AutoConfig.from_pretrained({str(tmp_path / "saved")!r}, trust_remote_code=True)
print(config.model_type, config.num_experts)
"""
    assert run_python(code).stdout.split() == ["moe_llama", "4"]
    assert AutoConfig.from_pretrained(tmp_path / "saved").num_experts == 4
