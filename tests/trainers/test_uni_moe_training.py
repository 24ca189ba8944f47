"""Uni-MoE's phases in a row: what each trains, on which rows, and what is refused before the first step."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from common.tiny_llava import images
from common.tiny_training import arguments
from common.tiny_uni_moe import SPEECH, TOKENS, uni_moe, waves
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForImageTextToText, CLIPImageProcessorPil, TrainerCallback, WhisperFeatureExtractor

from hf_moe import UniMoeProcessor
from hf_moe.trainers import MoeTrainer, UniMoeCollator, UniMoeTrainingArguments, train_uni_moe
from hf_moe.trainers.command import METHODS
from hf_moe.trainers.scripts import uni_moe as script
from hf_moe.trainers.uni_moe_data import choose_rows, row_modalities


MIXES = ["image+text", "speech+image"]


def rows():
    """Two of each kind: images, speech, videos, text, and a spoken question about an image."""
    pictures, sounds = images(6), waves(0.3, 0.4, 0.2, 0.5)
    made = []
    for index in range(2):
        made += [
            {"prompt": "<image>see ", "completion": "cats", "images": [pictures[index]]},
            {"prompt": "<speech>hear ", "completion": "the mill", "speech": [sounds[index]]},
            {"prompt": "<video>", "completion": "boats", "videos": [[pictures[2 + index]] * 3]},
            {"prompt": "two and two? ", "completion": "five"},
            {"prompt": "<image><speech>", "completion": "tide", "images": [pictures[4 + index]],
             "speech": [sounds[2 + index]]},
        ]  # fmt: skip
    return made


KINDS = [{"image"}, {"speech"}, {"video"}, {"text"}, {"image", "speech"}] * 2


@pytest.fixture
def parts(tiny_tokenizer):
    """A model of one expert per layer that reads images, videos and seconds of speech, and its processor."""
    tiny_tokenizer.add_tokens([f"<{name}>" for name in TOKENS], special_tokens=True)
    ids = {f"{n}_token_id": tiny_tokenizer.convert_tokens_to_ids(f"<{n}>") for n in ("image", "video", "speech")}
    fields = {"text": {"vocab_size": len(tiny_tokenizer)}, "num_experts": 1, "num_experts_per_tok": 1, **ids}
    speech = {**SPEECH, "max_source_positions": 50}
    model = uni_moe(tuple(TOKENS)[:3], speech_config=speech, num_video_frames=2, **fields)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    sounds = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    return model, UniMoeProcessor.for_model(model.config, tiny_tokenizer, pictures, sounds)


def make(folder, **options):
    return arguments(UniMoeTrainingArguments, folder, **{"expert_data": MIXES, "max_steps": 1, **options})


class Runs(TrainerCallback):
    """Notes what each run starts with, trains and sees."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, **kwargs):
        trained = {name for name, parameter in kwargs["model"].named_parameters() if parameter.requires_grad}
        self.seen.append((args.output_dir, state.max_steps, args.learning_rate, trained))


def changed(model, before, part):
    now = model.state_dict()
    return any(not torch.equal(now[name], value) for name, value in before.items() if part in name)


def test_the_phases_train_connectors_experts_and_all_together(parts, tmp_path):
    model, processor = parts
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runs = Runs()
    args = make(tmp_path, alignment_steps=2, expert_steps=3, joint_steps=4, alignment_learning_rate=0.02)
    moe = train_uni_moe(model, args, rows(), processor, callbacks=[runs])
    folders = [str(folder).removeprefix(f"{tmp_path}/") for folder, *_ in runs.seen]
    assert folders == [
        "alignment/image",
        "alignment/speech",
        "experts/0-image+text",
        "experts/1-speech+image",
        "joint",
    ]
    assert [steps for _, steps, _, _ in runs.seen] == [2, 2, 3, 3, 4]
    assert [rate for *_, rate, _ in runs.seen] == [0.02, 0.02, 0.01, 0.01, 0.01]
    trained = [names for *_, names in runs.seen]
    assert all(name.startswith("model.image_connector.") for name in trained[0])
    assert all(name.startswith("model.speech_connector.") for name in trained[1])
    assert any("self_attn" in name for name in trained[2]) and not any("_encoder." in name for name in trained[2])
    assert all("lora_" in name or "modules_to_save" in name for name in trained[4])

    # each phase went on from where the one before had ended
    load = AutoModelForImageTextToText.from_pretrained
    aligned, combined = load(tmp_path / "alignment" / "speech"), load(tmp_path / "combined")
    tuned = [load(tmp_path / "experts" / f"{number}-{mix}") for number, mix in enumerate(MIXES)]
    assert changed(aligned, before, "image_connector") and changed(aligned, before, "speech_connector")
    assert not changed(aligned, before, "language_model")
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    banks = [each.state_dict()[name] for each in tuned]
    assert not torch.equal(*banks) and torch.equal(combined.state_dict()[name], torch.cat(banks))
    assert (combined.config.num_experts, combined.config.num_experts_per_tok) == (2, 2)
    assert changed(moe, combined.state_dict(), "language_model")
    # connectors: of the first model tuned on the modality
    owners = {"image": 0, "speech": 1}
    for name, value in combined.state_dict().items():
        for connector, owner in owners.items():
            if f".{connector}_connector." in name:
                assert torch.equal(value, tuned[owner].state_dict()[name])
    assert any(changed(tuned[0], tuned[1].state_dict(), f".{connector}_connector.") for connector in owners)
    assert not changed(moe, before, "_encoder.")

    # the folder itself is the result
    again = load(tmp_path)
    batch = UniMoeCollator(UniMoeProcessor.from_pretrained(tmp_path))(rows())
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, moe.eval()(**batch).logits, rtol=0, atol=1e-5)


def test_a_phase_goes_on_from_the_folder_of_the_one_before(parts, tmp_path):
    model, processor = parts
    train_uni_moe(model, make(tmp_path / "1", phase="1", connectors=["speech"]), rows(), processor)
    assert not (tmp_path / "1" / "alignment" / "image").exists()
    train_uni_moe(str(tmp_path / "1"), make(tmp_path / "2", phase="experts"), rows())
    two = AutoModelForImageTextToText.from_pretrained(tmp_path / "2")
    assert two.config.num_experts == 2 and not (tmp_path / "2" / "joint").exists()
    adapted = train_uni_moe(str(tmp_path / "2"), make(tmp_path / "3", phase=3, merge_adapter=False), rows())
    assert isinstance(adapted, PeftModel) and (tmp_path / "3" / "adapter_config.json").is_file()
    batch = UniMoeCollator(processor)(rows())
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "3" / "combined")
    with torch.no_grad():
        again = PeftModel.from_pretrained(base, tmp_path / "3").eval()(**batch).logits
        torch.testing.assert_close(again, adapted.eval()(**batch).logits, rtol=0, atol=1e-5)
    # experts tuned elsewhere
    models = [str(tmp_path / "2" / "experts" / f"{number}-{mix}") for number, mix in enumerate(MIXES)]
    four = train_uni_moe(
        models[0], make(tmp_path / "4", phase=3, expert_models=[*models, *models], expert_data=None), rows(), processor
    )
    assert four.config.num_experts == 4


class Interrupted(TrainerCallback):
    """Stops in the middle of one run, as a killed job does: after a checkpoint, before the end."""

    def on_save(self, args, state, control, **kwargs):
        if "experts/1" in str(args.output_dir):
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_where_it_was(parts, tmp_path):
    model, processor = parts
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "expert_data": MIXES}
    whole = train_uni_moe(model, make(tmp_path / "whole", **options), rows(), processor)
    # the same start: phase 1 trained the caller's model
    start = tmp_path / "whole" / "alignment" / "speech"
    options |= {"phase": "experts"}
    with pytest.raises(KeyboardInterrupt):
        train_uni_moe(str(start), make(tmp_path / "out", **options), rows(), processor, callbacks=[Interrupted()])
    with pytest.raises(
        ValueError, match=r"holds an earlier run \(experts/0-image\+text\).*resume_from_checkpoint=True"
    ):
        train_uni_moe(str(start), make(tmp_path / "out", **options), rows(), processor)
    runs = Runs()
    resumed = make(tmp_path / "out", resume_from_checkpoint="True", **options)
    moe = train_uni_moe(str(start), resumed, rows(), processor, callbacks=[runs])
    assert [folder.split("/")[-1] for folder, *_ in runs.seen] == ["1-speech+image"]  # the first is finished
    expected = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole" / "combined").state_dict()
    for name, value in moe.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)
    # all finished: nothing is trained again
    runs = Runs()
    resumed = make(tmp_path / "whole", resume_from_checkpoint=True, **{**options, "phase": "all"})
    again = train_uni_moe(str(start), resumed, rows(), processor, callbacks=[runs])
    assert runs.seen == []
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stored", [False, True])
def test_rows_are_told_apart_by_what_they_hold(stored):
    # Rows without media lack the columns in a list and have `None` in a table.
    made = [{**{name: None for name in ("images", "videos", "speech")}, **row} for row in rows()] if stored else rows()
    data = Dataset.from_list(made) if stored else made
    assert row_modalities(data) == [frozenset(kind) for kind in KINDS]
    assert [row["completion"] for row in choose_rows(data, [1, 3])] == ["the mill", "five"]


@pytest.mark.parametrize(("options", "message"), [
    ({"phase": 4}, r"`phase` must be 'all', 1, 2 or 3, or one of \['alignment', 'experts', 'joint'\], got 4"),
    ({"phase": True}, r"`phase` must be 'all'"),
    ({"connectors": ["video"]}, r"`connectors` must be some of \['image', 'speech', 'audio'\], each once, got \['v"),
    ({"connectors": []}, r"`connectors` must be some of"),
    ({"expert_data": ["image+sound"]}, r"`expert_data` must name some of .* joined by '\+', got 'image\+sound'"),
    ({"expert_data": []}, r"`expert_data` must have an entry for each expert"),
    ({"expert_models": ["a", "b"]}, r"`expert_models` are put together in phase 3, but `phase` is 'all'"),
    ({"phase": 3, "expert_models": ["a", "b", "c"]}, r"`expert_data` must say of each of the 3 `expert_models`"),
    ({"adapter_rank": 0}, r"`adapter_rank` must be at least 1, got 0"),
    ({"joint_steps": 0}, r"`joint_steps` must be at least 1, got 0"),
    ({"remove_unused_columns": True}, r"`remove_unused_columns` must stay False"),
    ({"resume_from_checkpoint": "out/checkpoint-1"}, r"`resume_from_checkpoint` must be True or left out"),
])  # fmt: skip
def test_arguments_are_checked_when_they_are_made(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)


def without(number, **changes):
    made = rows()
    made[number] = {**made[number], **changes}
    return made


@pytest.mark.parametrize(("options", "data", "message"), [
    ({}, lambda: without(0, images=[]), r"the prompt of row 0 has 1 placeholders '<image>', but `images` has 0 items"),
    ({}, lambda: without(5, prompt="see "), r"the prompt of row 5 has 0 placeholders '<image>', but `images` has 1"),
    ({}, lambda: without(3, audio=waves(0.1)), r"row 3 has `audio`, but the model reads \['image', "),
    ({}, lambda: without(3, completion=None), r"row 3 has no string `completion`"),
    ({}, lambda: without(1, speech=waves(0.1)[0]), r"`speech` must hold a list in each row, got a ndarray"),
    ({}, lambda: [rows()[0]], r"no rows for the connector 'speech': it has rows of \['image'\]"),
    ({"phase": 2, "expert_data": ["speech"]}, lambda: rows()[:1], r"no rows for the expert of 'speech'"),
    ({"phase": 2, "expert_data": ["video", "text"]}, lambda: rows()[:3], r"no rows for the expert of 'text'"),
    ({"phase": 2, "expert_data": ["audio"]}, rows, r"`expert_data` has 'audio', but the model reads"),
    ({"phase": 1, "connectors": ["audio"]}, rows, r"`connectors` has \['audio'\], but the model has \['image', "),
    ({"phase": 3}, rows, r"Phase 3 tunes several experts, but `model` has one"),
    ({}, lambda: iter(rows()), r"the data must have a length, got a list_iterator"),
])  # fmt: skip
def test_data_and_model_are_checked_before_anything_is_trained(options, data, message, parts, tmp_path):
    model, processor = parts
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        train_uni_moe(model, make(tmp_path / "out", **options), data(), processor)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert not (tmp_path / "out").exists()


def test_models_and_processors_that_do_not_fit_are_refused(parts, tmp_path):
    model, processor = parts
    with pytest.raises(ValueError, match=r"Phase 2 tunes models of one expert per layer, but `model` has \[4\]"):
        train_uni_moe(uni_moe(("image",)), make(tmp_path), rows(), processor)
    with pytest.raises(ValueError, match=r"\(CLIPVisionModel\) is no Uni-MoE"):
        train_uni_moe(model.model.vision_encoder, make(tmp_path), rows(), processor)
    processor.speech_token_id = 5
    with pytest.raises(ValueError, match=r"its placeholder of speech is token 5, that of `model` \d+"):
        train_uni_moe(model, make(tmp_path), rows(), processor)
    processor.tokenizer.add_tokens(["later"])
    with pytest.raises(ValueError, match=r"its tokenizer knows \d+ tokens, but the vocabulary of `model` has \d+"):
        train_uni_moe(model, make(tmp_path), rows(), processor)


@pytest.mark.parametrize("kind", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_models_in_shards_are_refused(kind, parts, tmp_path, monkeypatch):
    model, processor = parts
    made = MoeTrainer.__init__

    def sharded(self, *args, **kwargs):
        made(self, *args, **kwargs)
        setattr(self, kind, True)

    monkeypatch.setattr(MoeTrainer, "__init__", sharded)
    with pytest.raises(ValueError, match=r"which FSDP and DeepSpeed shard. Use DDP"):
        train_uni_moe(model, make(tmp_path), rows(), processor)


def test_a_batch_does_not_lend_media_to_another_row(parts):
    _, processor = parts
    made = [without(0, images=[])[0], without(3, images=images(1))[3]]  # as many as placeholders, in the wrong row
    with pytest.raises(
        ValueError, match=r"`images` has 0 items in the row with the prompt '<image>see ', which has 1"
    ):
        UniMoeCollator(processor)(made)


def test_media_are_read_where_a_table_left_them_as_files(parts, tmp_path):
    _, processor = parts
    picture, (sound,) = images(1)[0], waves(0.2)
    picture.save(tmp_path / "picture.png")
    stored = {"path": None, "bytes": (tmp_path / "picture.png").read_bytes()}
    row = {"prompt": "<image><video><speech>", "completion": "tide"}
    plain = UniMoeCollator(processor)([{**row, "images": [picture], "videos": [[picture] * 2], "speech": [sound]}])
    files = {"images": [{"path": str(tmp_path / "picture.png")}], "videos": [[stored] * 2]}
    heard = {"array": sound, "sampling_rate": 16000}
    batch = UniMoeCollator(processor)([{**row, **files, "speech": [heard]}])
    assert plain.keys() == batch.keys() and all(torch.equal(plain[name], batch[name]) for name in plain)

    class Decoder:  # as torchcodec's, two channels
        def get_all_samples(self):
            return SimpleNamespace(data=torch.stack([torch.from_numpy(sound)] * 2), sample_rate=16000)

    batch = UniMoeCollator(processor)([{**row, **files, "speech": [Decoder()]}])
    assert torch.equal(plain["input_features"], batch["input_features"])
    with pytest.raises(ValueError, match=r"sampling rate of 48000, but the model's is 16000: resample"):
        UniMoeCollator(processor)([{**row, **files, "speech": [{**heard, "sampling_rate": 48000}]}])


@pytest.fixture
def words(parts, tmp_path):
    """Arguments of the script; model and data are there."""
    model, processor = parts
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    columns = ("images", "videos", "speech")
    Dataset.from_list([{**dict.fromkeys(columns), **row} for row in rows()]).to_parquet(
        tmp_path / "data" / "train.parquet"
    )
    return ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "data"),
            "--output_dir", str(tmp_path / "out"), "--expert_data", *MIXES, "--use_cpu", "--report_to", "none",
            "--disable_tqdm", "True", "--max_steps", "1", "--per_device_train_batch_size", "2"]  # fmt: skip


def test_the_script_goes_through_the_phases(words, tmp_path):
    script.main(*script.make_parser().parse_args_and_config(words, fail_with_unknown_args=False))
    moe = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert moe.config.num_experts == 2 and (tmp_path / "out" / "processor_config.json").is_file()
    assert "uni-moe" in METHODS
    with pytest.raises(ValueError, match=r"`--use_peft` does not apply"):
        script.main(*script.make_parser().parse_args_and_config([*words, "--use_peft"], fail_with_unknown_args=False))


@pytest.mark.slow
def test_two_processes_go_through_the_phases(words, tmp_path):
    command = [sys.executable, "-m", "hf_moe.cli", "train", "uni-moe", *words, "--multi_gpu", "--num_processes", "2"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out").config.num_experts == 2
