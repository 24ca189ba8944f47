"""A tiny dense model folder and the options that make a quickstart run in seconds."""

import pytest
import torch


@pytest.fixture(scope="session")
def dense_dir(tiny_tokenizer_dir, tmp_path_factory):
    """Folder with a dense Llama of two layers and its tokenizer; not to be changed."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("dense")
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_tokenizer_dir).save_pretrained(folder)
    return folder


def words(model, output):
    """Words after `hf-moe` for a run on a tiny model."""
    chosen = ["quickstart", "--model", str(model), "--output", str(output), "--domain", "reference"]
    return [*chosen, "--steps", "2", "--layers", "1", "--sequence-length", "32", "--held-out-tokens", "64"]


@pytest.fixture
def small(dense_dir, tmp_path):
    """Words after `hf-moe` for a run on the tiny model into `<tmp_path>/out`."""
    return words(dense_dir, tmp_path / "out")


@pytest.fixture(autouse=True)
def stand_in_plots(monkeypatch):
    """Drawing takes as long as all the rest of a tiny run. `finished` is made before this holds and has real plots."""

    def save(report, directory):
        (directory / "expert_load.png").write_bytes(b"not drawn")
        return {"expert_load.png": "Not drawn."}

    monkeypatch.setattr("hf_moe.reporting.plots.save_plots", save)


@pytest.fixture(scope="module")
def finished(dense_dir, tmp_path_factory):
    """Output folder of a finished run on the tiny model, and the run's exit code."""
    from hf_moe.cli import main

    output = tmp_path_factory.mktemp("finished") / "out"
    return output, main(words(dense_dir, output))
