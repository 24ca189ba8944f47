"""Self-contrast decoding as a folder, and `hf-moe export-decoder`."""

import pytest
import torch
from common.decoding import prompt, spread_model
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from hf_moe.cli import main
from hf_moe.generation import SelfContrast, export_decoder


class ListStreamer(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.extend(value.flatten().tolist())

    def end(self):
        self.ended += 1


@pytest.fixture(scope="module")
def model():
    return spread_model("mixtral")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(export_decoder(tmp_path_factory.mktemp("export") / "scmoe", beta=0.9))


def generate(model, **kwargs):
    return model.generate(prompt(2), max_new_tokens=6, do_sample=False, **kwargs)


def test_the_folder_decodes_with_its_settings(model, folder):
    output = generate(model, custom_generate=folder, trust_remote_code=True)
    assert torch.equal(output, generate(model, custom_generate=SelfContrast(beta=0.9)))


def test_a_call_may_say_otherwise(model, folder):
    output = generate(model, custom_generate=folder, trust_remote_code=True, beta=0.0, alpha=0.0, mode="separate")
    assert torch.equal(output, generate(model))
    with pytest.raises(ValueError, match="`beta` must be at least 0"):
        generate(model, custom_generate=folder, trust_remote_code=True, beta=-1.0)


def test_streamer_and_stop_strings_arrive(model, folder, tiny_tokenizer):
    streamer = ListStreamer()
    output = model.generate(
        prompt(), max_new_tokens=6, do_sample=False, custom_generate=folder, trust_remote_code=True, streamer=streamer,
        stop_strings=["zzz"], tokenizer=tiny_tokenizer,
    )  # fmt: skip
    assert streamer.values == output[0].tolist() and streamer.ended == 1


def test_an_assistant_is_refused(model, folder):
    with pytest.raises(ValueError, match="cannot run with an assistant"):
        generate(model, custom_generate=folder, trust_remote_code=True, assistant_model=model)


def test_it_is_code_that_has_to_be_trusted(model, folder):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        generate(model, custom_generate=folder, trust_remote_code=False)


def test_a_model_saved_beside_it_decodes_so_by_default(model, folder, tmp_path):
    expected = generate(model, custom_generate=folder, trust_remote_code=True)
    repository = tmp_path / "model"
    export_decoder(repository, beta=0.9)
    model.save_pretrained(repository)
    loaded = AutoModelForCausalLM.from_pretrained(repository, trust_remote_code=True)
    assert torch.equal(generate(loaded), expected)
    assert torch.equal(generate(loaded, beta=0.0, alpha=0.0), generate(model))
    assert torch.equal(generate(loaded, custom_generate=SelfContrast(beta=0, alpha=0)), generate(model))
    plain = AutoModelForCausalLM.from_pretrained(repository)
    assert torch.equal(generate(plain), generate(model))


def test_the_command_writes_the_folder(tmp_path, capsys):
    assert main(["export-decoder", str(tmp_path / "out"), "--beta", "0.3", "--weak", "top:1"]) == 0
    assert "custom_generate" in capsys.readouterr().out
    files = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert files == ["README.md", "custom_generate/generate.py", "custom_generate/requirements.txt"]
    code = (tmp_path / "out" / "custom_generate" / "generate.py").read_text()
    assert '"beta": 0.3' in code and '"weak": "top:1"' in code
    assert "2405.14507" in (tmp_path / "out" / "README.md").read_text()


def test_nothing_is_written_over_or_with_a_bad_setting(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["export-decoder", str(tmp_path / "full")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["export-decoder", str(tmp_path / "new"), "--weak", "best"]) == 2
    assert "`weak` must be" in capsys.readouterr().err
    with pytest.raises(ValueError, match="`streamer` is no setting of a folder"):
        export_decoder(tmp_path / "new", streamer=None)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
