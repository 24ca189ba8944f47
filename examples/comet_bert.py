"""COMET-BERT against MoEBERT: a fine-tuned BERT becomes four small experts per layer, and is distilled into them.

The task is real: from 16 word pieces, say which kind of text they come from (language reference, docstrings, code,
licences, project descriptions; text every machine with this package has). Whole documents are held out. A small
BERT learns it; its feed-forwards are split by importance (`ImportanceShared`: the most important channels to every
expert, the rest dealt by rank, a sixteenth of the width in all), and each mixture is distilled for the same steps on
the same batches:

    one expert      the important sixteenth alone, no routing
    hash            MoEBERT: a fixed random expert for each token id
    top-1           a softmax gate with the balance loss
    COMET           a tree of smooth steps with its entropy in the loss
    COMET+          the same, with a permutation of the experts learnt first

    python examples/comet_bert.py --preset short     # 3 seeds, 3 to 5 minutes on one core
    python examples/comet_bert.py --preset full      # 5 seeds, a larger BERT

Papers: https://huggingface.co/papers/2204.07675 (MoEBERT), https://huggingface.co/papers/2306.02824 (COMET).
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, Trainer, TrainingArguments

from hf_moe import upcycle
from hf_moe.corpora import DOMAINS, load_corpus
from hf_moe.files import write_text
from hf_moe.trainers import MoEDistillationConfig, MoEDistillationTrainer, hidden_state_discrepancy
from hf_moe.upcycling import Hash, ImportanceShared


class Preset(NamedTuple):
    seeds: tuple[int, ...]
    hidden_size: int
    layers: int
    passages: int  # of each kind, to train on
    teacher_steps: int
    student_steps: int
    characters: int


PRESETS = {
    "short": Preset((0, 1, 2), 96, 3, 1800, 500, 120, 600_000),
    "full": Preset((0, 1, 2, 3, 4), 192, 6, 6000, 2000, 1000, 2_000_000),
    "test": Preset((0, 1), 32, 2, 60, 4, 3, 40_000),
}
EXPERTS, LENGTH, BATCH, VOCABULARY, HELD_OUT = 4, 16, 64, 2000, 400
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
COMET = {"router_type": "comet", "router_aux_loss_coef": 0.0}
TREE = {"gamma": 0.1, "entropy_coef": 0.1}
METHODS: dict[str, dict[str, Any]] = {
    "one expert": {"num_experts": 1},
    "hash (MoEBERT)": {"router": Hash(), "router_aux_loss_coef": 0.0},
    "top-1": {"weights": "softmax"},
    "COMET": {**COMET, "router_config": TREE},
    "COMET+": {**COMET, "router_config": {**TREE, "permutation_search": {"num_steps": 0.25}}},
}
COLUMNS = {
    "before": "accuracy before distillation",
    "accuracy": "accuracy after",
    "distance": "distance to BERT",
    "experts": "experts per token",
    "seconds": "training seconds",
}


class Data(NamedTuple):
    train: list[dict[str, torch.Tensor]]
    held_out: dict[str, torch.Tensor]
    tokenizer: PreTrainedTokenizerFast


def make_data(preset: Preset) -> Data:
    """Passages of `LENGTH` word pieces after `[CLS]`, equally many of each kind, labelled by kind."""
    corpora = [load_corpus(kind, max_characters=preset.characters) for kind in DOMAINS]
    tokenizer = make_tokenizer([text for corpus in corpora for text in corpus.train])
    parts: dict[str, tuple[list, list]] = {"train": ([], []), "held_out": ([], [])}
    generator = torch.Generator().manual_seed(0)
    for label, corpus in enumerate(corpora):
        for name, count in (("train", preset.passages), ("held_out", HELD_OUT)):
            encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in getattr(corpus, name)]
            found = [ids[i : i + LENGTH] for ids in encoded for i in range(0, len(ids) - LENGTH + 1, LENGTH)]
            chosen = torch.randperm(len(found), generator=generator)[:count].tolist()
            passages, labels = parts[name]
            passages += [[tokenizer.cls_token_id, *found[i]] for i in chosen]
            labels += [label] * len(chosen)
    train = [
        {"input_ids": torch.tensor(ids), "labels": torch.tensor(y)} for ids, y in zip(*parts["train"], strict=True)
    ]
    held_out = {
        name: torch.tensor(values) for name, values in zip(("input_ids", "labels"), parts["held_out"], strict=True)
    }
    return Data(train, held_out, tokenizer)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A BPE tokenizer trained on the training documents. (WordPiece would break ties differently in every run.)"""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    pieces = Tokenizer(models.BPE(unk_token="[UNK]"))
    pieces.normalizer, pieces.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False)
    pieces.train_from_iterator(texts, trainer)
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=pieces, **dict(zip(names, SPECIAL, strict=True)))


def arguments(cls: type, output: Path, steps: int, seed: int, **options: Any) -> Any:
    return cls(
        str(output),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        logging_steps=max(1, steps // 4),
        report_to="none",
        disable_tqdm=True,
        **options,
    )


def fine_tune_bert(data: Data, preset: Preset, seed: int, output: Path) -> BertForSequenceClassification:
    """A small BERT from scratch, trained on the task."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(data.tokenizer),
        hidden_size=preset.hidden_size,
        intermediate_size=4 * preset.hidden_size,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.hidden_size // 32,
        max_position_embeddings=LENGTH + 1,
        num_labels=len(DOMAINS),
    )
    model = BertForSequenceClassification(config)
    args = arguments(TrainingArguments, output, preset.teacher_steps, seed, learning_rate=1e-3)
    Trainer(model, args, train_dataset=data.train).train()
    return model.eval()


def make_student(teacher: BertForSequenceClassification, data: Data, method: str, seed: int) -> Any:
    """MoEBERT's split, two thirds of an expert shared. MoEBERT's experts are a quarter as wide as the feed-forward; of
    so small a BERT that keeps everything, so here they are a sixteenth."""
    width = teacher.config.intermediate_size
    rows = data.train[:: max(1, len(data.train) // (8 * BATCH))]
    calibration = [
        {name: torch.stack([row[name] for row in rows[i : i + BATCH]]) for name in rows[0]}
        for i in range(0, len(rows), BATCH)
    ]
    options = {"num_experts": EXPERTS, **METHODS[method]}
    student, _ = upcycle(
        teacher,
        top_k=1,
        experts=ImportanceShared(width // 24 // 8 * 8, width=width // 16),
        calibration=calibration,
        check=False,
        seed=seed,
        **options,
    )
    return student


@torch.no_grad()
def measure(model: Any, data: Data, teacher: Any = None) -> dict[str, float]:
    """Held-out accuracy and, against a teacher, the distance of hidden states and the experts a token uses."""
    inputs = {name: value.to(model.device) for name, value in data.held_out.items()}
    labels = inputs.pop("labels")
    recorded = {} if teacher is None else {"output_hidden_states": True, "output_router_logits": True}
    outputs = model.eval()(**inputs, **recorded)
    result = {"accuracy": (outputs.logits.argmax(-1) == labels).float().mean().item()}
    if teacher is not None:
        states = teacher.to(model.device)(**inputs, output_hidden_states=True).hidden_states
        result["distance"] = hidden_state_discrepancy(outputs.hidden_states, states).item()
        used = [(index < model.config.num_experts).sum(-1).float().mean() for index in outputs.router_indices]
        result["experts"] = torch.stack(used).mean().item()
    return result


def run_one(teacher: Any, data: Data, preset: Preset, method: str, seed: int, output: Path) -> dict[str, Any]:
    """Splits, distils and measures one student."""
    student = make_student(teacher, data, method, seed)
    before = measure(student, data)["accuracy"]
    args = arguments(
        MoEDistillationConfig,
        output,
        preset.student_steps,
        seed,
        learning_rate=5e-4,
        router_learning_rate=3e-3,
        distillation_weight=5.0,
    )
    start = time.perf_counter()
    MoEDistillationTrainer(student, args, teacher_model=teacher, train_dataset=data.train).train()
    seconds = time.perf_counter() - start
    return {"method": method, "seed": seed, "before": before, **measure(student, data, teacher), "seconds": seconds}


def summarise(rows: list[dict], teachers: list[float]) -> str:
    """Mean and standard deviation over the seeds as a Markdown table, and COMET against the others seed by seed."""
    lines = ["| method | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines.append(f"| BERT | {spread(teachers)} | | 0 | | |")
    by_method = {name: [row for row in rows if row["method"] == name] for name in METHODS}
    for name, found in by_method.items():
        lines.append(f"| {name} | " + " | ".join(spread([row[column] for row in found]) for column in COLUMNS) + " |")
    lines.append("")
    for other in list(METHODS)[:3]:
        for name in ("COMET", "COMET+"):
            pairs = zip(by_method[name], by_method[other], strict=True)
            gaps = [ours["accuracy"] - theirs["accuracy"] for ours, theirs in pairs]
            lines.append(f"- {name} minus {other}: {', '.join(f'{gap:+.3f}' for gap in gaps)}")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values) if len(values) > 1 else 0.0:.3f}"


def draw(rows: list[dict], teachers: list[float], path: Path) -> None:
    """One dot per seed, a bar at the mean."""
    from matplotlib import pyplot as plt

    columns = ("accuracy", "distance", "experts")
    figure, all_axes = plt.subplots(1, len(columns), figsize=(4.4 * len(columns), 3.8), layout="constrained")
    for axes, column in zip(all_axes, columns, strict=True):
        for x, name in enumerate(METHODS):
            values = [row[column] for row in rows if row["method"] == name]
            axes.plot([x] * len(values), values, "o", alpha=0.7)
            axes.hlines(mean(values), x - 0.25, x + 0.25, color="black")
        axes.set_xticks(range(len(METHODS)), list(METHODS), rotation=30, ha="right")
        axes.set_title(COLUMNS[column])
    all_axes[0].axhline(mean(teachers), color="gray", linestyle=":", label="BERT")
    all_axes[0].legend()
    all_axes[2].set_ylim(0, EXPERTS + 0.1)
    figure.suptitle("Held-out passages; one dot per seed, bar at the mean")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(words: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="short")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the preset's")
    parser.add_argument("--output", type=Path, default=Path("comet-bert"))
    options = parser.parse_args(words)
    preset = PRESETS[options.preset]
    options.output.mkdir(parents=True, exist_ok=True)
    data = make_data(preset)
    rows, teachers = [], []
    for seed in options.seeds or preset.seeds:
        teacher = fine_tune_bert(data, preset, seed, options.output)
        teachers.append(measure(teacher, data)["accuracy"])
        print(f"seed {seed}, BERT: accuracy {teachers[-1]:.3f}")
        for method in METHODS:
            rows.append(run_one(teacher, data, preset, method, seed, options.output))
            print(f"seed {seed}, {method}: " + ", ".join(f"{column} {rows[-1][column]:.3f}" for column in COLUMNS))
    write_text(options.output / "results.json", json.dumps({"teachers": teachers, "rows": rows}, indent=2) + "\n")
    table = summarise(rows, teachers)
    write_text(options.output / "results.md", table)
    draw(rows, teachers, options.output / "results.png")
    print(table)
    return rows


if __name__ == "__main__":
    main()
