"""A tiny Uni-MoE with random encoders, a processor, and inputs of every modality."""

import numpy as np
import torch
from torch import nn

from common.tiny_llava import TEXT


__all__ = ["TOKENS", "inputs_of", "make_processor", "prompt", "uni_moe", "uni_moe_config", "waves"]

TOKENS = {"image": 60, "video": 61, "speech": 62, "audio": 63}
QUERIES = 5
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
SPEECH = {
    "model_type": "whisper",
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 60,
    "vocab_size": 10,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "init_std": 0.2,
}
AUDIO = {
    "model_type": "audio-spectrogram-transformer",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "patch_size": 4,
    "frequency_stride": 4,
    "time_stride": 4,
    "max_length": 16,
    "num_mel_bins": 8,
    "initializer_range": 0.2,
}
FORMER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
          "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}  # fmt: skip
ENCODERS = {"image": "vision", "video": "vision", "speech": "speech", "audio": "audio"}
CONFIGS = {"vision": VISION, "speech": SPEECH, "audio": AUDIO}
SHAPES = {"image": (3, 16, 16), "video": (3, 3, 16, 16), "speech": (8, 40), "audio": (16, 8)}
NAMES = {"image": "pixel_values", "video": "pixel_values_videos", "speech": "input_features", "audio": "audio_values"}
ROWS = {"image": 4, "video": 4, "speech": QUERIES, "audio": QUERIES}


def uni_moe_config(modalities=tuple(TOKENS), text_type: str = "llama", text: dict | None = None, **changes):
    """A `UniMoeConfig` of some modalities."""
    from hf_moe import UniMoeConfig

    encoders = {f"{ENCODERS[name]}_config": dict(CONFIGS[ENCODERS[name]]) for name in modalities}
    tokens = {f"{name}_token_id": TOKENS[name] for name in modalities}
    fields = {"num_query_tokens": QUERIES, "audio_connector": {"kind": "qformer", "config": FORMER}}
    fields |= {**encoders, **tokens, **changes}
    return UniMoeConfig(text_config={"model_type": text_type, **TEXT, **(text or {})}, **fields)


def uni_moe(modalities=tuple(TOKENS), seed: int = 0, implementation: dict | None = None, **changes):
    """A `UniMoeForConditionalGeneration` with random weights, the same each time."""
    from hf_moe import UniMoeForConditionalGeneration

    config = uni_moe_config(modalities, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = UniMoeForConditionalGeneration._from_config(config, **(implementation or {}))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.any():  # biases start at zero and would hide mistakes
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval()


def prompt(*parts: str | int) -> torch.Tensor:
    """Ids `(1, S)`: of a modality its placeholders, of a number that many words."""
    generator = torch.Generator().manual_seed(7)
    ids = []
    for part in parts:
        if isinstance(part, str):
            ids += [TOKENS[part]] * ROWS[part]
        else:
            ids += torch.randint(3, 60, (part,), generator=generator).tolist()
    return torch.tensor([ids])


def inputs_of(*parts: str | int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A prompt, see [`prompt`], and its media."""
    generator = torch.Generator().manual_seed(seed)
    ids = prompt(*parts)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name, shape in SHAPES.items():
        count = sum(part == name for part in parts)
        if count:
            inputs[NAMES[name]] = torch.randn(count, *shape, generator=generator)
    return inputs


def waves(*seconds: float, seed: int = 0) -> list[np.ndarray]:
    """Noise at 16 kHz."""
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(int(s * 16000)).astype(np.float32) * 0.1 for s in seconds]


def make_processor(tokenizer, config=None, parts=("image", "speech", "audio"), **options):
    """A `UniMoeProcessor` whose tokenizer has gained the placeholders."""
    from transformers import ASTFeatureExtractor, CLIPImageProcessorPil, WhisperFeatureExtractor

    from hf_moe import UniMoeProcessor

    tokenizer.add_tokens([f"<{name}>" for name in TOKENS], special_tokens=True)
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    made = [
        CLIPImageProcessorPil(**sizes) if "image" in parts else None,
        WhisperFeatureExtractor(feature_size=8) if "speech" in parts else None,
        ASTFeatureExtractor(num_mel_bins=8, max_length=16) if "audio" in parts else None,
    ]
    if config is not None:
        return UniMoeProcessor.for_model(config, tokenizer, *made, **options)
    return UniMoeProcessor(tokenizer, *made, patch_size=8, **options)
