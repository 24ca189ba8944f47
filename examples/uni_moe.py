"""Uni-MoE on real pictures and sounds: three phases of training against a dense model on the same data.

    python examples/uni_moe.py --data /usr/share/datasets/fashion-mnist --sounds /usr/share/sounds/alsa \\
        --whisper openai/whisper-tiny.en --output out

One language model answers in words about what it sees and hears:

| kind | prompt | answer |
|---|---|---|
| picture | one picture of Fashion-MNIST, "what is it ?" | its class |
| mosaic | four pictures, "what is rear left ?" | the class of one of them |
| video | a picture that moves through four frames, "what moves ?" | its class |
| speech | a spoken clip, "what was said ?" | "front left" |
| spoken | four pictures, and a clip that says which | the class of one of them |

Clips are the channel names of the Debian package `alsa-utils` (`Front_Left.wav` and so on); without `--sounds` they
are pairs of tones, computed here. The speech encoder and the connector behind it are Whisper's, cut to one second;
without `--whisper` a small one is trained here first, as are the picture encoder (a small CLIP vision transformer that
learns the classes) and the language model (a small Llama that learns the questions with words in the place of pictures
and clips). All methods and seeds share these three. Held out are pictures of the test set, and the same recordings at
other speeds and loudness, with other noise.

Methods, each from the same alignment, with the same rows and number of steps after it:

- Uni-MoE: three experts, tuned on pictures, on speech with pictures, and on videos with pictures, then LoRA on all
  rows.
- copies: one model is tuned on all rows, three copies of it become the experts, then LoRA on all rows.
- dense: one model is tuned on all rows.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
import wave
from pathlib import Path
from typing import Any, NamedTuple

import fashion_mnist
import numpy as np
import torch
from torch import nn


CLASSES = ("top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
CHANNELS = ("front center", "front left", "front right", "rear center", "rear left", "rear right", "side left",
            "side right")  # fmt: skip
PLACES = ("front left", "front right", "rear left", "rear right")  # of the four pictures, in their order
KINDS = ("picture", "mosaic", "video", "speech", "spoken")
TOKENS = ("<image>", "<video>", "<speech>")
WORDS = ("what", "is", "it", "?", "moves", "was", "said", "front", "rear", "side", "left", "right", "center")
RATE, SECONDS, QUERIES, FRAMES = 16_000, 1, 8, 4
METHODS = ("Uni-MoE", "copies", "dense")
MIXES = ("image", "speech+image", "video+image")
EVERYTHING = "image+video+speech"
MODALITIES = ("text", "image", "video", "speech")

VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
          "image_size": 28, "patch_size": 14}  # fmt: skip
SPEECH = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
          "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_mel_bins": 80,
          "vocab_size": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
          "decoder_start_token_id": 1}  # fmt: skip
TEXT = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 256}  # fmt: skip
PRESETS = {
    "tiny": {"encoder_steps": 2, "text_steps": 2, "align_steps": 2, "expert_steps": 2, "joint_steps": 2,
             "batch_size": 4, "rows": 4, "held_out": 2, "seeds": [0]},
    "short": {"encoder_steps": 600, "text_steps": 1500, "align_steps": 100, "expert_steps": 80, "joint_steps": 200,
              "batch_size": 16, "rows": 600, "held_out": 150, "seeds": [0, 1, 2]},
}  # fmt: skip


class Parts(NamedTuple):
    """What all methods start from."""

    model: Any
    processor: Any
    notes: dict[str, Any]


# -- sounds ------------------------------------------------------------------------------------------------------
def load_clips(folder: str | None) -> list[np.ndarray]:
    """The spoken channel names at 16 kHz, in the order of `CHANNELS`; tones without a folder."""
    if folder is None:
        pitch = {word: 300 * 1.3**i for i, word in enumerate(("front", "rear", "side", "left", "right", "center"))}
        times = np.arange(RATE // 2) / RATE
        tones = {word: np.sin(2 * np.pi * hertz * times) * np.hanning(len(times)) for word, hertz in pitch.items()}
        return [np.concatenate([tones[word] for word in name.split()]).astype(np.float32) for name in CHANNELS]
    clips = []
    for name in CHANNELS:
        path = Path(folder) / f"{name.title().replace(' ', '_')}.wav"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: `--sounds` takes the folder of alsa-utils, or nothing.")
        with wave.open(str(path)) as file:
            if (file.getnchannels(), file.getsampwidth(), file.getframerate()) != (1, 2, 3 * RATE):
                raise ValueError(f"{path} should have one channel of 16 bits at {3 * RATE} Hz.")
            samples = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
        clips.append(samples[: len(samples) // 3 * 3].reshape(-1, 3).mean(1))
    return clips


def varied(clip: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """What is said in a clip within a second: at another speed, loudness and start, with noise."""
    loud = np.flatnonzero(np.convolve(np.abs(clip), np.ones(160) / 160, "same") > 0.1 * np.abs(clip).max())
    said = clip[loud[0] : loud[-1] + 1] if len(loud) else clip
    length = int(RATE * SECONDS * random.uniform(0.75, 0.95))
    sound = np.interp(np.linspace(0, len(said) - 1, length), np.arange(len(said)), said) * random.uniform(0.4, 1.0)
    before = random.integers(RATE * SECONDS - length)
    sound = np.concatenate([np.zeros(before), sound, np.zeros(RATE * SECONDS - length - before)])
    return (sound + random.normal(0, 0.005, len(sound))).astype(np.float32)


# -- rows --------------------------------------------------------------------------------------------------------
def grey(picture: np.ndarray) -> np.ndarray:
    return np.repeat(picture[..., None], 3, -1)  # (28, 28, 3)


def moving(picture: np.ndarray, random: np.random.Generator) -> list[np.ndarray]:
    """Frames in which a picture goes up, down, left or right, two pixels at a time."""
    axis, way = random.integers(2), random.choice((-2, 2))
    return [grey(np.roll(picture, way * (number - FRAMES // 2), int(axis))) for number in range(FRAMES)]


def make_rows(
    kind: str, number: int, images: np.ndarray, labels: np.ndarray, clips: list[np.ndarray], random: Any
) -> list[dict[str, Any]]:
    """Questions of one kind, as `UniMoeCollator` reads them."""
    rows = []
    for _ in range(number):
        picks = random.integers(len(labels), size=4)
        names = [CLASSES[labels[pick]] for pick in picks]
        pictures = [grey(images[pick]) for pick in picks]
        place = int(random.integers(4))
        if kind == "picture":
            row = {"prompt": "<image> what is it ?", "completion": names[0], "images": pictures[:1]}
        elif kind == "mosaic":
            prompt = f"<image> <image> <image> <image> what is {PLACES[place]} ?"
            row = {"prompt": prompt, "completion": names[place], "images": pictures}
        elif kind == "video":
            frames = moving(images[picks[0]], random)
            row = {"prompt": "<video> what moves ?", "completion": names[0], "videos": [frames]}
        elif kind == "speech":
            channel = int(random.integers(len(CHANNELS)))
            sound = varied(clips[channel], random)
            row = {"prompt": "<speech> what was said ?", "completion": CHANNELS[channel], "speech": [sound]}
        else:
            sound = varied(clips[CHANNELS.index(PLACES[place])], random)
            row = {"prompt": "<image> <image> <image> <image> <speech>", "completion": names[place]}
            row |= {"images": pictures, "speech": [sound]}
        rows.append(row)
    return rows


def text_row(random: np.random.Generator) -> tuple[str, str]:
    """A question of any kind with words where the media would be, each several times: media take several tokens."""
    kind, times = KINDS[random.integers(len(KINDS))], int(random.integers(1, 5))
    names = [CLASSES[i] for i in random.integers(len(CLASSES), size=4)]
    seen = [" ".join([name] * times) for name in names]
    place = int(random.integers(4))
    if kind in ("picture", "video"):
        return f"{seen[0]} {'what is it ?' if kind == 'picture' else 'what moves ?'}", names[0]
    if kind == "speech":
        channel = CHANNELS[random.integers(len(CHANNELS))]
        return " ".join([channel] * times) + " what was said ?", channel
    question = f"what is {PLACES[place]} ?" if kind == "mosaic" else " ".join([PLACES[place]] * times)
    return f"{' '.join(seen)} {question}", names[place]


# -- what the methods start from ----------------------------------------------------------------------------------
def learn_classes(encoder: nn.Module, features: Any, size: int, draw: Any, classes: int, steps: int) -> float:
    """Trains an encoder to tell classes apart by the mean of its rows; returns the accuracy on the last batches."""
    head = nn.Linear(size, classes)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    hits: list[float] = []
    encoder.train()
    for _ in range(steps):
        values, labels = draw()
        logits = head(features(encoder, values).mean(1))
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        hits.append((logits.argmax(-1) == labels).float().mean().item())
    encoder.eval()
    return float(np.mean(hits[-20:]))


def make_vision_encoder(data: Any, processor: Any, steps: int) -> tuple[Any, float]:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    random = np.random.default_rng(0)

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        picks = random.integers(len(data.train_labels), size=96)
        pixels = processor([grey(data.train_images[pick]) for pick in picks], return_tensors="pt")["pixel_values"]
        return pixels, torch.from_numpy(data.train_labels[picks]).long()

    def features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
        return model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]  # what Uni-MoE takes

    encoder = CLIPVisionModel(CLIPVisionConfig(**VISION))
    return encoder, learn_classes(encoder, features, VISION["hidden_size"], draw, len(CLASSES), steps)


def make_speech_model(source: str | None, clips: list[np.ndarray], extractor: Any, steps: int) -> tuple[Any, Any]:
    """A Whisper for `SECONDS` seconds: the first positions of a trained one, or a small one that learns the clips."""
    from transformers import WhisperConfig, WhisperModel

    positions = 50 * SECONDS
    if source is not None:
        whole = WhisperModel.from_pretrained(source)
        state = whole.state_dict()
        name = "encoder.embed_positions.weight"
        state[name] = state[name][:positions]
        whole.config.max_source_positions = positions
        model = WhisperModel(whole.config)
        model.load_state_dict(state)
        return model.eval(), None
    model = WhisperModel(WhisperConfig(**SPEECH, max_source_positions=positions))
    random = np.random.default_rng(1)

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        picks = random.integers(len(clips), size=16)
        sounds = [varied(clips[pick], random) for pick in picks]
        values = extractor(sounds, sampling_rate=RATE, return_tensors="pt")["input_features"]
        return values, torch.from_numpy(picks).long()

    def features(model: Any, values: torch.Tensor) -> torch.Tensor:
        return model.encoder(values).last_hidden_state

    return model, learn_classes(model, features, SPEECH["d_model"], draw, len(clips), max(1, steps // 2))


def make_language_model(tokenizer: Any, steps: int) -> tuple[Any, float]:
    """A small Llama that has learned to answer where words stand for pictures and sounds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    random = np.random.default_rng(2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, **TEXT))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, (0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    hits: list[float] = []
    for _ in range(steps):
        rows = [text_row(random) for _ in range(64)]
        prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in rows]
        answers = [tokenizer(answer)["input_ids"] + [1] for _, answer in rows]
        batch = tokenizer.pad({"input_ids": [p + a for p, a in zip(prompts, answers, strict=True)]},
                              return_tensors="pt")  # fmt: skip
        labels = torch.full_like(batch["input_ids"], -100)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        output = model(**batch, labels=labels)
        output.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        hits.append(float(right(output.logits, labels).float().mean()))
    return model.eval(), float(np.mean(hits[-20:]))


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", *WORDS, *CLASSES]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", padding_side="right"
    )
    tokenizer.add_tokens(list(TOKENS), special_tokens=True)
    return tokenizer


def make_parts(args: argparse.Namespace, data: Any, clips: list[np.ndarray]) -> Parts:
    """A Uni-MoE of one expert per layer whose connectors are new, and its processor."""
    from transformers import CLIPImageProcessorPil, WhisperFeatureExtractor

    from hf_moe import UniMoeProcessor, upcycle_uni_moe

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    pictures = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, do_convert_rgb=False)
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=SECONDS)
    vision, seen = make_vision_encoder(data, pictures, args.encoder_steps)
    speech, heard = make_speech_model(args.whisper, clips, extractor, args.encoder_steps)
    language, read = make_language_model(tokenizer, args.text_steps)
    fields = {f"{token[1:-1]}_token_id": tokenizer.convert_tokens_to_ids(token) for token in TOKENS}
    fields |= {"num_query_tokens": QUERIES, "num_video_frames": FRAMES}
    model, _ = upcycle_uni_moe(
        language, 1, 1, "sparse", vision_encoder=vision, speech_model=speech, config_fields=fields, check=False
    )
    processor = UniMoeProcessor.for_model(model.config, tokenizer, pictures, extractor)
    return Parts(model, processor, {"picture encoder": seen, "speech encoder": heard, "words": read})


# -- the methods -------------------------------------------------------------------------------------------------
def train(method: str, aligned: Path, rows: list[dict[str, Any]], folder: Path, args: Any, seed: int) -> Any:
    """One method from the aligned model on; all take `len(MIXES) * expert_steps + joint_steps` steps."""
    from hf_moe.trainers import train_uni_moe

    alone = len(MIXES) * args.expert_steps
    if method == "Uni-MoE":
        options = arguments(folder / "2", args, seed, phase="2", expert_data=list(MIXES))
        train_uni_moe(str(aligned), options, rows)
    else:
        steps = alone + (args.joint_steps if method == "dense" else 0)
        options = arguments(folder / "2", args, seed, phase="2", expert_data=[EVERYTHING], expert_steps=steps)
        model = train_uni_moe(str(aligned), options, rows)
        if method == "dense":
            return model
    copies = [str(folder / "2" / "experts" / f"0-{EVERYTHING}")] * len(MIXES) if method == "copies" else None
    return train_uni_moe(str(folder / "2"), arguments(folder / "3", args, seed, phase="3", expert_models=copies), rows)


def arguments(folder: Path, args: argparse.Namespace, seed: int, **options: Any) -> Any:
    from hf_moe.trainers import UniMoeTrainingArguments

    steps = {name: getattr(args, name) for name in ("expert_steps", "joint_steps")}
    fields = {
        **steps,
        "alignment_steps": args.align_steps,
        "learning_rate": 1e-3,
        "joint_learning_rate": 2e-3,
        **options,
    }
    return UniMoeTrainingArguments(
        str(folder), per_device_train_batch_size=args.batch_size, seed=seed, save_strategy="no", logging_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, **fields,
    )  # fmt: skip


def right(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of each row, whether all tokens of its answer are the most likely ones `(B,)`."""
    said, wanted = logits[:, :-1].argmax(-1), labels[:, 1:]
    return ((said == wanted) | (wanted == -100)).all(-1)


@torch.no_grad()
def measure(model: Any, processor: Any, held_out: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Accuracy of each kind of question, their mean and the gap between the best and the worst."""
    from hf_moe.trainers import UniMoeCollator

    model.eval()
    found = {}
    for kind, rows in held_out.items():
        hits = []
        for start in range(0, len(rows), 50):
            batch = UniMoeCollator(processor)(rows[start : start + 50])
            hits += right(model(**batch).logits, batch["labels"]).tolist()
        found[kind] = sum(hits) / len(hits)
    return {**found, "mean": statistics.mean(found.values()), "gap": max(found.values()) - min(found.values())}


@torch.no_grad()
def routing(model: Any, processor: Any, held_out: dict[str, list[dict[str, Any]]]) -> dict[str, list[list[float]]]:
    """Of the tokens of each modality, the share that each expert gets, per MoE layer `(L, N)`."""
    from hf_moe.trainers import UniMoeCollator

    experts = model.config.num_experts
    counts = {modality: torch.zeros(len(model.config.moe_layer_indices), experts) for modality in MODALITIES}
    ids = {modality: getattr(model.config, f"{modality}_token_id") for modality in MODALITIES[1:]}
    for rows in held_out.values():
        batch = UniMoeCollator(processor)(rows[:50])
        chosen = model(**batch, output_router_logits=True).router_indices
        tokens, real = batch["input_ids"].flatten(), batch["attention_mask"].flatten().bool()
        media = torch.zeros_like(real)
        places = {}
        for modality, token_id in ids.items():
            places[modality] = tokens == token_id
            media |= places[modality]
        places["text"] = real & ~media
        for layer, indices in enumerate(chosen):
            for modality, where in places.items():
                picked = indices.reshape(len(tokens), -1)[where].flatten()
                counts[modality][layer] += torch.bincount(picked, minlength=experts)
    return {name: (count / count.sum(-1, keepdim=True).clamp(min=1)).tolist() for name, count in counts.items()}


def sizes(model: Any) -> dict[str, int]:
    """Parameters of the language model, and those a token uses."""
    language = model.model.language_model
    total = sum(p.numel() for p in language.parameters()) + model.lm_head.weight.numel()
    banks = sum(p.numel() for name, p in language.named_parameters() if ".mlp.experts." in name)
    used = min(model.config.num_experts_per_tok, model.config.num_experts) / model.config.num_experts
    return {"parameters": total, "active": int(total - banks * (1 - used))}


def run_seed(seed: int, parts: Parts, source: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Alignment, then each method from there, with one seed."""
    import copy

    from hf_moe.trainers import train_uni_moe

    random = np.random.default_rng(seed)  # the same rows for all methods
    rows = [row for kind in KINDS for row in make_rows(kind, args.rows, *source["train"], source["clips"], random)]
    results = []
    with tempfile.TemporaryDirectory() as place:
        home, start = Path(place), time.process_time()
        options = arguments(home / "1", args, seed, phase="1")
        model = train_uni_moe(copy.deepcopy(parts.model), options, rows, parts.processor)
        shared = time.process_time() - start
        aligned = measure(model, parts.processor, source["held out"])
        for method in METHODS:
            start = time.process_time()
            model = train(method, home / "1", rows, home / method, args, seed)
            seconds = shared + time.process_time() - start
            row = {"method": method, "seed": seed, **measure(model, parts.processor, source["held out"])}
            row |= {**sizes(model), "cpu_seconds": round(seconds, 1), "aligned": aligned}
            if model.config.num_experts > 1:
                row["routing"] = routing(model, parts.processor, source["held out"])
            results.append(row)
            print(f"seed {seed}, {method}: " + ", ".join(f"{kind} {row[kind]:.3f}" for kind in (*KINDS, "mean")) +
                  f", {seconds:.0f} s", flush=True)  # fmt: skip
            shutil.rmtree(home / method)
    return results


# -- what is written ---------------------------------------------------------------------------------------------
def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds with standard deviations."""
    columns = (*KINDS, "mean", "gap")
    lines = ["| method | active / all parameters | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]

    def cells(runs: list[dict[str, Any]]) -> str:
        spread = [statistics.stdev([run[c] for run in runs]) if len(runs) > 1 else 0.0 for c in columns]
        means = [statistics.mean(run[c] for run in runs) for c in columns]
        return " | ".join(f"{mean:.3f} ± {sd:.3f}" for mean, sd in zip(means, spread, strict=True))

    first = [row for row in rows if row["method"] == rows[0]["method"]]
    lines.append(f"| after alignment | | {cells([row['aligned'] for row in first])} |")
    for method in dict.fromkeys(row["method"] for row in rows):
        runs = [row for row in rows if row["method"] == method]
        lines.append(f"| {method} | {runs[0]['active']:,} / {runs[0]['parameters']:,} | {cells(runs)} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracies by kind of question, and which experts of Uni-MoE see which modality."""
    from matplotlib import pyplot as plt

    figure, (left, right_axis) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for number, method in enumerate(methods):
        runs = [row for row in rows if row["method"] == method]
        for run in runs:
            left.plot([x + 0.2 * (number - 1) for x in range(len(KINDS))], [run[kind] for kind in KINDS], "o",
                      color=f"C{number}", alpha=0.7, label=method if run is runs[0] else None)  # fmt: skip
    left.set_xticks(range(len(KINDS)), KINDS)
    left.set(ylabel="accuracy, held out", ylim=(0, 1.05), title="a dot per seed")
    left.legend()
    shares = np.mean([[np.mean(row["routing"][m], axis=0) for m in MODALITIES] for row in rows
                      if row["method"] == "Uni-MoE"], axis=0)  # fmt: skip
    bottom = np.zeros(len(MODALITIES))
    for expert in range(shares.shape[1]):
        right_axis.bar(MODALITIES, shares[:, expert], bottom=bottom, label=f"expert of {MIXES[expert]}")
        bottom += shares[:, expert]
    right_axis.set(ylabel="share of choices", title="Uni-MoE: who sees which tokens")
    right_axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Uni-MoE's three phases against a dense model on the same data.")
    parser.add_argument("--data", help="folder with Fashion-MNIST's idx files; from the Hub if left out")
    parser.add_argument("--sounds", help="folder with alsa-utils' wav files; tones if left out")
    parser.add_argument("--whisper", help="a Whisper of transformers, Hub id or folder; a small new one if left out")
    parser.add_argument("--output", default="uni_moe", help="folder for results.md, results.json and results.png")
    parser.add_argument("--preset", default="short", choices=PRESETS)
    parser.add_argument("--seeds", type=int, nargs="+")
    for name, value in PRESETS["short"].items():
        if isinstance(value, int):
            parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    args = parser.parse_args(arguments)
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    from transformers.utils import logging

    args = parse_arguments(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    data, clips = fashion_mnist.load(args.data), load_clips(args.sounds)
    start = time.process_time()
    parts = make_parts(args, data, clips)
    print(f"accuracies on the last batches of what is shared: {parts.notes}, {time.process_time() - start:.0f} s")
    test, random = (data.test_images, data.test_labels), np.random.default_rng(12345)
    held_out = {kind: make_rows(kind, args.held_out, *test, clips, random) for kind in KINDS}
    source = {"train": (data.train_images, data.train_labels), "clips": clips, "held out": held_out}
    rows = []
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    result = {"settings": vars(args) | {"data": None, "sounds": args.sounds and Path(args.sounds).name},
              "shared": parts.notes, "rows": rows}  # fmt: skip
    result["settings"] |= {"whisper": args.whisper and Path(args.whisper).name, "output": None}
    for seed in args.seeds:
        rows += run_seed(seed, parts, source, args)
        (output / "results.json").write_text(json.dumps(result, indent=1))  # what is done stays if the rest is not
        (output / "results.md").write_text(table(rows))
        draw(rows, output / "results.png")
    print(table(rows))
    return result


if __name__ == "__main__":
    main()
