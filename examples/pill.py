"""PILL: a frozen language model learns to read pictures as tokens.

Four pictures of Fashion-MNIST make a mosaic. A small frozen network (trained here on the ten classes) turns each
picture into one vector, a linear projector makes image tokens of the vectors, and the language model answers "What is
top left?" or "What is left?". First captions ("coat, bag, dress, sandal") in the stage "align", then questions in the
stage "instruct". The ablations drop the gate, the adapter per modality, or both; beside them stand LoRA with as many
parameters, and the projector alone. Same data, batches and steps for all; held-out mosaics are made of held-out
pictures.

    python examples/pill.py --data /usr/share/datasets/fashion-mnist     # minutes on one core
    python examples/pill.py --model auto --preset full                   # SmolLM2-135M, wants a better machine

The language model of the short preset is a small one that is trained here, first of all and without pictures, on the
same questions about four words ("coat bag dress sandal What is top left?"). How well it still answers those after it
learned to read pictures is the second thing that is measured. Writes results.json, results.md and results.png.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


sys.path.insert(0, str(Path(__file__).parent))
import fashion_mnist


WORDS = ("tee", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
PLACES = ("top left", "top right", "bottom left", "bottom right")
PAIRS = {"top": (0, 1), "bottom": (2, 3), "left": (0, 2), "right": (1, 3)}
METHODS: dict[str, dict[str, Any] | None] = {
    "PILL": {},
    "no gate": {"attention_gate": False},
    "one adapter for both": {"modality_experts": False},
    "neither": {"attention_gate": False, "modality_experts": False},
    "LoRA": None,
    "projector only": None,
}
PRESETS = {
    "short": {"text_steps": 500, "align_steps": 250, "steps": 500, "batch_size": 32, "held_out": 1000},
    "full": {"text_steps": 0, "align_steps": 600, "steps": 4000, "batch_size": 64, "held_out": 4000},
}
SMALL = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class Mosaics(NamedTuple):
    """Pictures as vectors, and their classes."""

    features: torch.Tensor  # (N, F)
    labels: torch.Tensor  # (N,)


class Batch(NamedTuple):
    """Shapes: B mosaics, P prompt tokens (padded on the left), A answer tokens (padded on the right)."""

    pictures: torch.Tensor | None  # (B, 4, F); None when the prompt has words instead
    prompts: torch.Tensor  # (B, P)
    prompt_mask: torch.Tensor  # (B, P)
    answers: torch.Tensor  # (B, A), -100 where there is none
    kinds: list[str]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="short")
    parser.add_argument("--model", default="small", help="folder or Hub id of a Llama-like model, or 'auto' (SmolLM2)")
    parser.add_argument("--data", help="folder with the idx files of Fashion-MNIST; from the Hub by default")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--text-steps", type=int, help="steps on questions about words, before anything is frozen")
    parser.add_argument("--text-share", type=float, default=0.0, help="share of the question steps that have words")
    parser.add_argument("--align-steps", type=int)
    parser.add_argument("--steps", type=int, help="steps on questions")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--held-out", type=int, help="questions on held-out mosaics")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the language model")
    parser.add_argument("--pictures", type=int, default=60_000, help="pictures to train with")
    parser.add_argument("--encoder-epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("pill-results"))
    args = parser.parse_args(arguments)
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def picture_vectors(data: fashion_mnist.Pictures, epochs: int, number: int) -> tuple[Mosaics, Mosaics, float]:
    """Trains the small network on the ten classes; gives its vectors of both splits and its held-out accuracy."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip

    def split(images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(images).float().unsqueeze(1) / 255 - 0.3, torch.from_numpy(labels).long()

    train = split(data.train_images[:number], data.train_labels[:number])
    test = split(data.test_images, data.test_labels)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(train[0])).split(128):
            loss = F.cross_entropy(network(train[0][rows]), train[1][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        vectors = [torch.cat([network[:6](part) for part in images.split(2000)]) for images, _ in (train, test)]
        accuracy = (network[6:](vectors[1]).argmax(-1) == test[1]).float().mean().item()
    mean, spread = vectors[0].mean(0), vectors[0].std(0) + 1e-3
    parts = [
        Mosaics((part - mean) / spread, labels) for part, labels in zip(vectors, (train[1], test[1]), strict=True)
    ]
    return parts[0], parts[1], accuracy


def make_batch(
    source: Mosaics, tokenizer: Any, size: int, random: np.random.Generator, *, captions: float, words: bool = False
) -> Batch:
    """Random mosaics, a share of them with captions, the others with one question: about one picture or about two."""
    index = random.integers(len(source.labels), size=(size, 4))
    prompts, answers, kinds = [], [], []
    for labels in source.labels[torch.from_numpy(index)].tolist():
        pick = random.random()
        if pick < captions:
            kind, prompt, answer = "caption", "", ",".join(f" {WORDS[label]}" for label in labels)
        elif pick < captions + (1 - captions) / 2:
            place = random.integers(4)
            kind, prompt, answer = "place", f" What is {PLACES[place]}?", f" {WORDS[labels[place]]}"
        else:
            side = list(PAIRS)[random.integers(4)]
            kind, prompt = "pair", f" What is {side}?"
            answer = ",".join(f" {WORDS[labels[place]]}" for place in PAIRS[side])
        before = "".join(f" {WORDS[label]}" for label in labels) if words else ""
        prompts.append(encode(tokenizer, before + prompt))
        answers.append(encode(tokenizer, answer))
        kinds.append(kind)
    longest, most = max(map(len, prompts)), max(map(len, answers))
    return Batch(
        None if words else source.features[torch.from_numpy(index)],
        torch.tensor([(0,) * (longest - len(p)) + p for p in prompts], dtype=torch.long).view(size, longest),
        torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], dtype=torch.long).view(size, longest),
        torch.tensor([a + (-100,) * (most - len(a)) for a in answers]),
        kinds,
    )


@lru_cache(maxsize=200_000)
def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()


def answer_logits(model: Any, projector: Any, batch: Batch, adapted: bool) -> torch.Tensor:
    """Logits at the answers' places `(B, A, V)`; image tokens stand first."""
    size, tokens = batch.answers.shape
    embed = model.get_input_embeddings()
    embeds = embed(torch.cat([batch.prompts, batch.answers.clamp(min=0)[:, :-1]], dim=1))
    # What follows an answer comes after all that is asked for, so it need not be masked.
    mask = torch.cat([batch.prompt_mask, torch.ones(size, tokens - 1, dtype=torch.long)], dim=1)
    modality = torch.zeros_like(mask)
    if batch.pictures is not None:
        embeds = torch.cat([projector(batch.pictures).to(embeds.dtype), embeds], dim=1)
        modality = torch.cat([torch.ones(size, 4, dtype=torch.long), modality], dim=1)
        mask = torch.cat([torch.ones(size, 4, dtype=torch.long), mask], dim=1)
    keep = torch.arange(embeds.shape[1] - tokens, embeds.shape[1])
    extra = {"modality_mask": modality} if adapted else {}
    return model(inputs_embeds=embeds, attention_mask=mask, logits_to_keep=keep, use_cache=False, **extra).logits


def answer_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), batch.answers.flatten(), ignore_index=-100)


def measure(model: Any, projector: Any, batches: list[Batch], adapted: bool) -> dict[str, float]:
    """Share of right answers (all of their tokens most likely) by kind of question, and the answers' perplexity."""
    right: dict[str, list[bool]] = {}
    losses = []
    model.eval()
    with torch.no_grad():
        for batch in batches:
            logits = answer_logits(model, projector, batch, adapted)
            losses.append(answer_loss(logits, batch).item())
            hits = ((logits.argmax(-1) == batch.answers) | (batch.answers == -100)).all(-1).tolist()
            for kind, hit in zip(batch.kinds, hits, strict=True):
                right.setdefault(kind, []).append(hit)
    model.train()
    return {kind: sum(hits) / len(hits) for kind, hits in right.items()} | {
        "perplexity": float(np.exp(np.mean(losses)))
    }


def lora_rank(base: Any, parameters: int) -> int:
    """The rank with which LoRA on all linear layers has about as many parameters."""
    from peft import LoraConfig, get_peft_model

    one = get_peft_model(copy.deepcopy(base), LoraConfig(r=1, target_modules="all-linear"))
    return max(1, round(parameters / one.get_nb_trainable_parameters()[0]))


def wrap(method: str, base: Any, args: argparse.Namespace) -> Any:
    """The model with the method's adapter."""
    from peft import LoraConfig, get_peft_model

    import hf_moe

    if method == "projector only":
        return base.requires_grad_(False)
    if method == "LoRA":
        pill = get_peft_model(copy.deepcopy(base), hf_moe.PillConfig(r=args.rank))
        rank = lora_rank(base, pill.get_nb_trainable_parameters()[0])
        return get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    return get_peft_model(base, hf_moe.PillConfig(r=args.rank, stage="align", **METHODS[method]))


def run_one(method: str, seed: int, base: Any, tokenizer: Any, parts: dict[str, Any], args: Any) -> dict[str, Any]:
    """Trains one method with one seed and measures it."""
    torch.manual_seed(seed)
    adapted = METHODS[method] is not None
    start = time.process_time()
    projector = nn.Linear(parts["train"].features.shape[1], base.config.hidden_size, bias=False)
    nn.init.normal_(projector.weight, std=0.02)  # before the adapters, so that it is the same for all methods
    model = wrap(method, copy.deepcopy(base), args)
    if adapted:
        model.set_stage("default", "instruct")  # once with everything trainable, for the optimizer
    weights = [p for p in model.parameters() if p.requires_grad]
    if adapted:
        model.set_stage("default", "align")
    optimizer = torch.optim.AdamW([*weights, *projector.parameters()], args.learning_rate, (0.9, 0.95))
    total = args.align_steps + args.steps

    def rate(step: int) -> float:
        begin, end = (0, args.align_steps) if step < args.align_steps else (args.align_steps, total)
        done = (step - begin) / max(1, end - begin)
        return min(1.0, (step - begin + 1) / 10) * 0.5 * (1 + float(np.cos(np.pi * done)))

    random = np.random.default_rng(seed)  # the same batches for all methods
    losses, row = [], {"method": method, "seed": seed}
    model.train()
    for step in range(total):
        aligning = step < args.align_steps
        if step == args.align_steps and adapted:
            row["text perplexity aligned"] = measure(model, None, parts["text"], adapted)["perplexity"]
            model.set_stage("default", "instruct")
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate(step)
        words = not aligning and args.text_share > 0 and random.random() < args.text_share
        batch = make_batch(parts["train"], tokenizer, args.batch_size, random, captions=float(aligning), words=words)
        loss = answer_loss(answer_logits(model, projector, batch, adapted), batch)
        optimizer.zero_grad()
        if loss.requires_grad:  # words do not pass the projector
            loss.backward()
        nn.utils.clip_grad_norm_([*weights, *projector.parameters()], 1.0)
        optimizer.step()
        losses.append(loss.item())
    row |= measure(model, projector, parts["held out"], adapted)
    row |= {f"text {name}": value for name, value in measure(model, None, parts["text"], adapted).items()}
    row |= {
        "parameters": sum(weight.numel() for weight in weights),
        "losses": [round(loss, 4) for loss in losses],
        "gate": gate_size(model),
        "cpu_seconds": time.process_time() - start,
    }
    print(f"{method}, seed {seed}: place {row['place']:.3f}, pair {row['pair']:.3f}, text place "
          f"{row['text place']:.3f}, {row['cpu_seconds']:.0f} s", flush=True)  # fmt: skip
    return row


def gate_size(model: Any) -> float | None:
    """Mean size of the gates' weights: 0 while they are closed."""
    sizes = [p.detach().abs().mean() for name, p in model.named_parameters() if "hfmoe_pill_gate" in name]
    return float(torch.stack(sizes).mean()) if sizes else None


COLUMNS = {
    "place": "one picture",
    "pair": "two pictures",
    "text place": "text: one word",
    "text pair": "text: two words",
    "text perplexity": "text: perplexity of answers",
}


def summarise(result: dict[str, Any]) -> str:
    """Mean and standard deviation over the seeds, as a Markdown table."""
    base = result["base"]
    lines = [
        "| method | parameters beside the projector | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
        f"| base | 0 | | | {base['place']:.3f} | {base['pair']:.3f} | {base['perplexity']:.3f} |",
    ]
    for method in dict.fromkeys(row["method"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["method"] == method]
        cells = [f"{rows[0]['parameters']:,}"]
        for column in COLUMNS:
            values = [row[column] for row in rows]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Guessing gives 0.1 and 0.01. Classes of single pictures can be read off their vectors with accuracy "
        f"{result['picture_accuracy']:.3f}.",
        f'A fresh adapter changes no logit of text: {result["fresh_is_base"]}. After the stage "align", text has '
        f"exactly the base's perplexity, wherever it has an adapter of its own: {aligned_is_base(result)}.",
    ]
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracies, one dot per seed, and the loss while training."""
    from matplotlib import pyplot as plt

    rows = result["rows"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = plt.subplots(1, 4, figsize=(18, 4), layout="constrained")
    for axis, kind, chance in zip(axes[:3], ("place", "pair", "text place"), (0.1, 0.01, 0.1), strict=True):
        for x, method in enumerate(methods):
            values = [row[kind] for row in rows if row["method"] == method]
            axis.plot([x] * len(values), values, "o", alpha=0.7)
            axis.hlines(statistics.mean(values), x - 0.25, x + 0.25, color="black")
        axis.axhline(chance, color="gray", linestyle=":", label="guessing")
        axis.set_xticks(range(len(methods)), methods, rotation=25, ha="right")
        axis.set(ylabel="accuracy, held out", ylim=(0, 1.15))
    axes[0].set_title("pictures: What is top left?")
    axes[1].set_title("pictures: What is left?")
    axes[2].set_title("words: What is top left?")
    axes[2].axhline(result["base"]["place"], color="tab:red", linestyle=":", label="base")
    for axis, corner in zip(axes[:3], ("upper right", "upper right", "lower center"), strict=True):
        axis.legend(loc=corner)
    width = max(1, len(rows[0]["losses"]) // 30)
    for method in methods:
        curve = np.mean([row["losses"] for row in rows if row["method"] == method], axis=0)
        smooth = np.convolve(curve, np.ones(width) / width, "valid")
        axes[3].plot(np.arange(len(smooth)) + width, smooth, label=method)
    axes[3].axvline(result["settings"]["align_steps"], color="gray", linestyle=":")
    axes[3].set(title="loss: captions, then questions (mean of seeds)", xlabel="step")
    axes[3].set_ylim(0, 5)
    axes[3].legend(ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def load_base(args: argparse.Namespace) -> tuple[Any, Any]:
    """The language model: one of transformers' own, or a new one of a few layers."""
    if args.model != "small":
        import hf_moe

        return hf_moe.load_dense(args.model, getattr(torch, args.dtype))
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", ",", "?", "What", "is", "top", "bottom", "left", "right", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), max_position_embeddings=64, pad_token_id=0, **SMALL))
    return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def learn_text(model: Any, tokenizer: Any, source: Mosaics, steps: int) -> None:
    """Trains the whole model on questions about four words."""
    random = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, (0.9, 0.95), weight_decay=0.01)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * min(1.0, 2 * (1 - step / steps))
        batch = make_batch(source, tokenizer, 64, random, captions=0.2, words=True)
        loss = answer_loss(answer_logits(model, None, batch, False), batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            print(f"text, step {step + 1}: loss {loss.item():.3f}", flush=True)
    model.eval()


def fresh_is_base(base: Any, batch: Batch, rank: int) -> bool:
    """Whether a fresh adapter leaves the logits of text as they are, bit for bit."""
    from peft import get_peft_model

    import hf_moe

    with torch.no_grad():
        expected = answer_logits(base, None, batch, False)
        model = get_peft_model(copy.deepcopy(base), hf_moe.PillConfig(r=rank)).eval()
        return bool(torch.equal(answer_logits(model, None, batch, True), expected))


def aligned_is_base(result: dict[str, Any]) -> bool:
    """Whether text has the base's perplexity after aligning, wherever text has an adapter of its own."""
    separate = [m for m, fields in METHODS.items() if fields is not None and fields.get("modality_experts", True)]
    values = {row["text perplexity aligned"] for row in result["rows"] if row["method"] in separate}
    return values <= {result["base"]["perplexity"]}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse_arguments(arguments)
    from hf_moe.files import write_text

    args.output.mkdir(parents=True, exist_ok=True)
    train, test, picture_accuracy = picture_vectors(fashion_mnist.load(args.data), args.encoder_epochs, args.pictures)
    base, tokenizer = load_base(args)
    learn_text(base, tokenizer, train, args.text_steps)
    base.requires_grad_(False)
    random = np.random.default_rng(12345)
    size = min(200, args.held_out)
    count = max(1, args.held_out // size)
    parts: dict[str, Any] = {
        "train": train,
        "held out": [make_batch(test, tokenizer, size, random, captions=0.0) for _ in range(count)],
        "text": [make_batch(test, tokenizer, size, random, captions=0.0, words=True) for _ in range(count)],
    }
    result: dict[str, Any] = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "base": measure(base, None, parts["text"], False),
        "picture_accuracy": picture_accuracy,
        "fresh_is_base": fresh_is_base(base.eval(), parts["text"][0], args.rank),
    }
    print(f"base, on text: {result['base']}", flush=True)
    result["rows"] = []
    for seed in args.seeds:
        for method in args.methods:
            result["rows"].append(run_one(method, seed, base, tokenizer, parts, args))
            write_text(args.output / "results.json", json.dumps(result, indent=2) + "\n")
    table = summarise(result)
    write_text(args.output / "results.md", table)
    draw(result, args.output / "results.png")
    print(table)
    return result


if __name__ == "__main__":
    main()
