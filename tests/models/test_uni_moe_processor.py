"""`UniMoeProcessor`: placeholders are expanded to what the model needs, and nothing is read that has no place."""

import numpy as np
import pytest
import torch
from common.tiny_llava import images
from common.tiny_uni_moe import SPEECH, TOKENS, make_processor, uni_moe, waves
from transformers import AutoProcessor

from hf_moe import UniMoeProcessor
from hf_moe.models.uni_moe.segments import sample_frames
from hf_moe.reporting import routing_report


def counts(processor, batch) -> list[int]:
    ids = [getattr(processor, f"{name}_token_id") for name in TOKENS]
    return [0 if token is None else int((batch["input_ids"] == token).sum()) for token in ids]


def test_each_item_gets_its_tokens(tiny_tokenizer):
    processor = make_processor(tiny_tokenizer)
    video = [np.asarray(image) for image in images(11)]
    batch = processor(
        text=["<image>a<image>", "<video>b<speech>c", "<audio>d<speech>"],
        images=images(2),
        videos=[video],
        speech=waves(65, 2),
        audio=waves(0.4),
        padding=True,
        return_tensors="pt",
    )
    assert counts(processor, batch) == [2 * 4, 4, 50 * (3 + 1), 50 * 3]
    shapes = {name: tuple(value.shape) for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
    assert shapes == {
        "pixel_values": (2, 3, 16, 16),
        "pixel_values_videos": (1, 8, 3, 16, 16),
        "input_features": (4, 8, 3000),
        "audio_values": (3, 16, 8),
        "audio_mask": (3, 16),
    }
    speech = (batch["input_ids"] == processor.speech_token_id).sum(-1)
    assert speech.tolist() == [0, 150, 50]  # the order of speech is that of the prompts


@pytest.mark.parametrize(("seconds", "segments"), [(0.1, 1), (29.9, 1), (30, 1), (30.1, 2), (65, 3)])
def test_every_started_half_minute_of_speech_counts(seconds, segments, tiny_tokenizer):
    processor = make_processor(tiny_tokenizer, parts=("speech",))
    batch = processor(text="<speech>?", speech=waves(seconds), return_tensors="pt")
    assert counts(processor, batch)[2] == 50 * segments and len(batch["input_features"]) == segments


def test_short_sounds_are_padded_and_masked(tiny_tokenizer):
    processor = make_processor(tiny_tokenizer, parts=("audio",))
    batch = processor(text="<audio><audio>", audio=waves(0.1, 0.01), return_tensors="pt")
    assert batch["audio_values"].shape == (2, 16, 8)
    assert batch["audio_mask"].sum(-1).tolist() == [8, 1]  # windows of 25 ms every 10 ms


def test_frames_are_spread_over_the_video():
    assert sample_frames(list(range(9)), 3) == [0, 4, 8]
    assert sample_frames([5], 3) == [5, 5, 5]
    with pytest.raises(ValueError, match="without frames"):
        sample_frames([], 3)


def test_numbers_of_a_model_reach_its_processor_and_its_batches_the_model(tiny_tokenizer):
    tiny_tokenizer.add_tokens([f"<{name}>" for name in TOKENS], special_tokens=True)
    ids = {f"{name}_token_id": tiny_tokenizer.convert_tokens_to_ids(f"<{name}>") for name in TOKENS}
    text = {"vocab_size": len(tiny_tokenizer)}
    model = uni_moe(
        text=text,
        video_pool="concat",
        num_video_frames=3,
        speech_config={**SPEECH, "max_source_positions": 1500},
        **ids,
    )
    processor = make_processor(tiny_tokenizer, model.config)
    video = np.stack([np.asarray(image) for image in images(5)])
    batch = processor(
        text=["<image> what <video>", "<speech>x<audio>"],
        images=images(1), videos=[video], speech=waves(1), audio=waves(0.1), padding=True, return_tensors="pt",
    )  # fmt: skip
    assert counts(processor, batch) == [4, 12, 5, 5]
    assert model(**batch).logits.isfinite().all()


def test_routing_reports_tell_media_apart(tiny_tokenizer):
    tiny_tokenizer.add_tokens([f"<{name}>" for name in TOKENS], special_tokens=True)
    ids = {f"{name}_token_id": tiny_tokenizer.convert_tokens_to_ids(f"<{name}>") for name in TOKENS}
    speech = {**SPEECH, "max_source_positions": 1500}
    model = uni_moe(text={"vocab_size": len(tiny_tokenizer)}, speech_config=speech, **ids)
    processor = make_processor(tiny_tokenizer, model.config)
    batch = processor(text="<image>a river<speech>", images=images(1), speech=waves(1), return_tensors="pt")
    report = routing_report(model, processor, [batch])
    assert {name: report.token_classes[name] for name in ("image", "speech")} == {"image": 4, "speech": 5}
    assert all(sum(layer.class_load["speech"]) == pytest.approx(1) for layer in report.layers)


@pytest.mark.parametrize("parts", [("image", "speech", "audio"), ("speech",), ("image",), ()])
def test_a_processor_is_saved_and_loaded_with_the_parts_it_has(parts, tiny_tokenizer, tmp_path):
    processor = make_processor(tiny_tokenizer, parts=parts, num_speech_tokens=7)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is UniMoeProcessor and again.num_speech_tokens == 7 and again.patch_size == 8
    assert again.get_attributes() == processor.get_attributes() and len(again.get_attributes()) == 1 + len(parts)
    assert again.chat_template == processor.chat_template
    inputs = {"text": "hello"}
    if "speech" in parts:
        inputs = {"text": "<speech>hello", "speech": waves(0.2)}
    for name, value in processor(**inputs, return_tensors="pt").items():
        assert torch.equal(again(**inputs, return_tensors="pt")[name], value)


def test_a_fresh_process_finds_the_processor_first(tiny_tokenizer, tmp_path, run_python):
    make_processor(tiny_tokenizer, parts=("speech",)).save_pretrained(tmp_path)
    code = f"""
import sys, hf_moe
assert "transformers.processing_utils" not in sys.modules
from transformers import AutoProcessor
print(type(AutoProcessor.from_pretrained({str(tmp_path)!r})).__name__)
"""
    run = run_python(code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["UniMoeProcessor"]


@pytest.mark.parametrize(("inputs", "message"), [
    ({"text": "<speech>"}, r"`text` has 1 placeholders '<speech>', but there are 0 items of speech"),
    ({"text": "a", "speech": waves(1)}, r"`text` has 0 placeholders '<speech>', but there are 1 items"),
    ({"text": "<image>", "images": images(1)}, r"There is image, but this processor has no `image_processor`"),
    ({"text": "<speech>", "speech": waves(1), "sampling_rate": 8000}, r"`sampling_rate` must be 16000, got 8000"),
    ({"text": "<speech>", "speech": [np.zeros(0)]}, r"at least one sample, got the shape \(0,\)"),
    ({"text": "<speech>", "speech": [np.zeros((2, 9))]}, r"one channel.*\(2, 9\)"),
    ({"speech": waves(1)}, r"`text` is missing"),
])  # fmt: skip
def test_what_does_not_belong_together_is_refused(inputs, message, tiny_tokenizer):
    processor = make_processor(tiny_tokenizer, parts=("speech",))
    with pytest.raises(ValueError, match=message):
        processor(**inputs)


def test_a_placeholder_has_to_be_in_the_tokenizer(tiny_tokenizer):
    with pytest.raises(ValueError, match=r"`speech_token` \('<talk>'\) is not in the tokenizer.*add_tokens"):
        make_processor(tiny_tokenizer, parts=("speech",), speech_token="<talk>")
