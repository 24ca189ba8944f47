"""CLIP-MoE on pictures of clothes: experts from stages of contrastive learning, against copies and a dense CLIP.

A small CLIP is trained here on canvases with two pictures of Fashion-MNIST and captions such as "a large dark coat top
left and a small bag bottom right" (examples/fashion_captions.py). From there every arm takes the same number of
further steps, on the same pairs, in batches of the same size:

    dense             all of the CLIP trained further
    copies            sparse upcycling: four copies of the feed-forwards, experts and routers trained
    random batches    CLIP-MoE's schedule without its clusters: the stages differ in the order of their batches alone
    CLIP-MoE          three stages on batches from within clusters make experts 1 to 3, the CLIP itself is expert 0,
                      then routers alone are trained; a quarter of the steps each

and answers for held-out pictures: retrieval of captions by canvases and the other way round (no two captions are the
same), and zero-shot questions about the first picture, its class, size and shade. For each stage there is how far its
clusters agree with what is on the canvases, and what its model alone knows.

    python examples/clip_moe.py --data /usr/share/datasets/fashion-mnist     # 3 seeds, 6 minutes each on one core
    python examples/clip_moe.py --preset long --data ...                     # the CLIP they start from learned longer
    python examples/clip_moe.py --preset full --data ...                     # 5 seeds, a larger CLIP

Learning rates are the best of three for each arm, by retrieval on validation pictures, in runs of half the length with
a seed that is not reported (`--preset tune --learning-rate 3e-4 --output ...`). Runs that are finished are kept in
--output and not made again. Writes results.json, results.md, results.png, and each CLIP-MoE as a folder that
`pipeline` loads.

Paper: https://huggingface.co/papers/2409.19291
"""

import argparse
import copy
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel, set_seed


sys.path.insert(0, str(Path(__file__).parent))
import clip_moe_report
import fashion_captions
import fashion_mnist
from clip_moe_report import ARMS, NUM_EXPERTS, TASKS
from fashion_captions import VOCABULARY, Canvases, describe, encode, questions

import hf_moe
from hf_moe.files import new_folder, write_text
from hf_moe.trainers import (
    ContrastiveConfig,
    ContrastiveTrainer,
    encode_pairs,
    multistage_contrastive_learning,
    retrieval_recall,
    zero_shot_accuracy,
)


@dataclass(frozen=True)
class Preset:
    seeds: tuple[int, ...]
    pairs: int  # to train on
    held_out: int  # canvases for retrieval and questions, each of validation and of test
    base_steps: int
    steps: int  # of every arm; divisible by 4
    batch_size: int
    hidden_size: int
    layers: int
    num_clusters: int  # per modality and stage
    base_learning_rate: float = 1e-3


PRESETS = {
    "tiny": Preset((0, 1), 400, 60, 4, 8, 4, 32, 1, 2),
    "tune": Preset((100,), 30_000, 1000, 500, 160, 128, 64, 3, 2),
    "short": Preset((0, 1, 2), 20_000, 1000, 800, 320, 128, 64, 3, 2),
    "long": Preset((0, 1, 2), 50_000, 1000, 4000, 320, 128, 64, 3, 2),
    "full": Preset((0, 1, 2, 3, 4), 200_000, 2000, 10_000, 8_000, 256, 256, 6, 2),
}
#: The best of 3e-4, 1e-3 and 3e-3 for each arm on validation pictures (preset tune, seed 100).
LEARNING_RATES = {"dense": 1e-3, "copies": 1e-3, "random batches": 1e-3, "CLIP-MoE": 3e-4}
#: Routers are new and few: ten times the rate of the rest, in all sparse arms.
ROUTER_FACTOR = 10


def make_data(folder: str | None, preset: Preset, seed: int) -> dict[str, Canvases]:
    """Canvases to train on, to validate and to test with, of three sets of pictures."""
    data = fashion_mnist.load(folder)
    cut = len(data.train_images) * 5 // 6
    train = describe(data.train_images[:cut], data.train_labels[:cut])
    validation = describe(data.train_images[cut:], data.train_labels[cut:])
    test = describe(data.test_images, data.test_labels)
    return {
        "train": Canvases(train, preset.pairs, seed),
        "validation": Canvases(validation, preset.held_out, 1, full=True),
        "held out": Canvases(test, preset.held_out, 2, full=True),
    }


def make_clip(preset: Preset, seed: int) -> CLIPModel:
    """A small CLIP with new weights."""
    ids = {word: number for number, word in enumerate(VOCABULARY)}
    sizes = {
        "hidden_size": preset.hidden_size,
        "intermediate_size": 4 * preset.hidden_size,
        "num_hidden_layers": preset.layers,
        "num_attention_heads": max(1, preset.hidden_size // 32),
        "projection_dim": 64,
    }
    text = {
        "vocab_size": len(VOCABULARY),
        "max_position_embeddings": 15,
        "bos_token_id": ids["<begin>"],
        "eos_token_id": ids["<end>"],
        "pad_token_id": ids["<pad>"],
    }
    vision = {"image_size": fashion_captions.IMAGE_SIZE, "patch_size": fashion_captions.PATCH_SIZE}
    set_seed(seed)
    return CLIPModel(CLIPConfig(text_config={**sizes, **text}, vision_config={**sizes, **vision}, projection_dim=64))


def arguments(output: Path, preset: Preset, steps: int, rate: float, seed: int, **options: Any) -> ContrastiveConfig:
    return ContrastiveConfig(
        str(output),
        max_steps=steps,
        learning_rate=rate,
        router_learning_rate=ROUTER_FACTOR * rate if options["trained"] in ("router", "moe") else None,
        weight_decay=0.05,
        warmup_steps=0.05,
        per_device_train_batch_size=preset.batch_size,
        per_device_eval_batch_size=2 * preset.batch_size,
        fixed_logit_scale=None,  # learned with the base
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_steps=max(1, steps // 4),
        report_to="none",
        disable_tqdm=True,
        **options,
    )


def fit(model: Any, args: ContrastiveConfig, data: Canvases) -> Any:
    """Trains, and gives the model back."""
    set_seed(args.seed)  # dropout too is that of the seed, whatever ran before
    trainer = ContrastiveTrainer(model, args, train_dataset=data, data_collator=data.collate)
    trainer.train()
    return model.requires_grad_(True).eval()


def train_arm(arm: str, base: CLIPModel, data: Canvases, preset: Preset, rate: float, seed: int, output: Path):
    """One arm; returns its model, and of arms with stages their models and clusters."""
    run = {"preset": preset, "rate": rate, "seed": seed}
    if arm == "dense":
        return fit(copy.deepcopy(base), arguments(output, steps=preset.steps, trained="all", **run), data), [], []
    if arm == "copies":
        moe = hf_moe.upcycle_clip(base, num_experts=NUM_EXPERTS, seed=seed)
        return fit(moe, arguments(output, steps=preset.steps, trained="moe", **run), data), [], []
    steps, stages = preset.steps // NUM_EXPERTS, NUM_EXPERTS - 1
    args = arguments(output, steps=steps, trained="feed_forward", **run)
    if arm == "CLIP-MoE":
        models, clusters = multistage_contrastive_learning(
            base, data, args, num_stages=stages, num_clusters=preset.num_clusters, data_collator=data.collate
        )
    else:
        models, clusters = [base], []
        for stage in range(stages):
            own = copy.copy(args)
            own.seed = 1000 * (stage + 1) + seed
            models.append(fit(copy.deepcopy(base), own, data))
    moe = hf_moe.upcycle_clip(base, models, seed=seed)
    return fit(moe, arguments(output, steps=steps, trained="router", **run), data), models, clusters


def measure(model: Any, canvases: Canvases) -> dict[str, float]:
    """Retrieval recall, and the share of right answers to the zero-shot questions."""
    images, texts = encode_pairs(model, canvases, canvases.collate, 250)
    found = retrieval_recall(images, texts)
    for what in TASKS:
        right = 0.0
        for rows, candidates, labels in questions(canvases, what):
            ids = encode(candidates).to(model.device)
            with torch.no_grad():
                classes = model.get_text_features(input_ids=ids, attention_mask=(ids != 0).long()).pooler_output
            classes = torch.nn.functional.normalize(classes, dim=-1).cpu()
            right += len(rows) * zero_shot_accuracy(images[torch.from_numpy(rows)], classes, labels)
        found[what] = right / len(canvases)
    return found


def purity(labels: torch.Tensor, truth: np.ndarray) -> tuple[float, float]:
    """Share of pairs that have the most frequent value of their cluster; and the same for shuffled clusters."""

    def share(clusters: np.ndarray) -> float:
        table = np.zeros((clusters.max() + 1, truth.max() + 1), int)
        np.add.at(table, (clusters, truth), 1)
        return float(table.max(1).sum() / len(truth))

    clusters = np.unique(labels.numpy(), return_inverse=True)[1]
    return share(clusters), share(np.random.default_rng(0).permutation(clusters))


def count(model: Any) -> dict[str, int]:
    """Parameters, and those of them that a token passes."""
    total = sum(p.numel() for p in model.parameters())
    if isinstance(model, hf_moe.MoeClipModel):
        experts = sum(p.numel() for view in hf_moe.moe_layers(model) for p in view.experts.parameters())
        chosen = model.config.vision_config.num_experts_per_tok
        return {"parameters": total, "activated": total - experts * (NUM_EXPERTS - chosen) // NUM_EXPERTS}
    return {"parameters": total, "activated": total}


def stage_report(models: list[Any], clusters: list[torch.Tensor], data: dict[str, Canvases], preset: Preset) -> list:
    """What each model of an arm with stages alone knows, and what its clusters are about."""
    found = []
    for number, model in enumerate(models):
        row: dict[str, Any] = {"stage": number, **measure(model, data["held out"])}
        if clusters and number:
            labels = clusters[number - 1]
            sizes = labels.unique(return_counts=True)[1]
            row["clusters"] = len(sizes)
            row["used"] = float((sizes // preset.batch_size * preset.batch_size).sum() / len(labels))
            row["purity"] = {name: purity(labels, truth) for name, truth in data["train"].attributes().items()}
        found.append(row)
    return found


def run_seed(seed: int, args: argparse.Namespace, preset: Preset) -> list[dict]:
    """The base and every arm of one seed; what is in the folder already is not made again."""
    folder = args.output / f"seed-{seed}"
    todo = ["base", *(arm for arm in ARMS if arm in args.arms)]
    missing = [arm for arm in todo if not (folder / f"{arm}.json").exists()]
    if missing:
        data = make_data(args.data, preset, seed)
        if not (folder / "base").exists():
            start = time.process_time()
            rate = preset.base_learning_rate
            options = arguments(folder / "runs", preset, preset.base_steps, rate, seed, trained="all")
            base = fit(make_clip(preset, seed), options, data["train"])
            with new_folder(folder / "base") as partial:
                base.save_pretrained(partial)
                write_text(partial / "seconds.json", json.dumps(time.process_time() - start) + "\n")
        base = CLIPModel.from_pretrained(folder / "base").eval()
    for arm in missing:
        rate = args.learning_rate or LEARNING_RATES.get(arm, 0.0)
        start = time.process_time()
        model, models, clusters = base, [], []
        if arm != "base":
            model, models, clusters = train_arm(
                arm, base, data["train"], preset, rate, seed, folder / "runs"
            )  # the same number of steps and pairs for all
        seconds = time.process_time() - start
        if arm == "base":
            seconds = json.loads((folder / "base" / "seconds.json").read_text(encoding="utf-8"))
        row = {
            "arm": arm,
            "seed": seed,
            "learning_rate": rate,
            "validation": measure(model, data["validation"]),
            "held_out": measure(model, data["held out"]),
            "stages": stage_report(models, clusters, data, preset),
            "cpu_seconds": seconds,
            **count(model),
        }
        if arm == "CLIP-MoE" and not (folder / "clip-moe").exists():
            with new_folder(folder / "clip-moe") as partial:
                model.save_pretrained(partial)
                fashion_captions.make_processor().save_pretrained(partial)
            row["pipeline_agrees"] = pipeline_agrees(folder / "clip-moe", model, data["held out"])
        write_text(folder / f"{arm}.json", json.dumps(row, indent=1) + "\n")
        found = row["held_out"]
        both = clip_moe_report.recall(found)
        print(
            f"seed {seed}, {arm}: recall@1 {both:.3f}, class {found['class']:.3f}, {seconds:.0f} s of CPU", flush=True
        )
    return [json.loads((folder / f"{arm}.json").read_text(encoding="utf-8")) for arm in todo]


def pipeline_agrees(folder: Path, model: Any, canvases: Canvases, number: int = 8) -> float:
    """Share of canvases whose class `pipeline` sees as the model that was trained does."""
    from PIL import Image
    from transformers import CLIPImageProcessorPil, pipeline

    classify = pipeline(
        "zero-shot-image-classification",
        model=str(folder),
        image_processor=CLIPImageProcessorPil.from_pretrained(folder),
        device=model.device,
    )
    images = encode_pairs(model, canvases, canvases.collate)[0]
    same = []
    for rows, candidates, _ in questions(canvases, "class")[:1]:
        ids = encode(candidates).to(model.device)
        with torch.no_grad():
            classes = model.get_text_features(input_ids=ids, attention_mask=(ids != 0).long()).pooler_output.cpu()
        for row in rows[:number]:
            picture = Image.fromarray(canvases.draw(np.array([row]))[0]).convert("RGB")
            answers = classify(picture, candidate_labels=candidates, hypothesis_template="{}")
            direct = (torch.nn.functional.normalize(classes, dim=-1) @ images[row]).argmax()
            same.append(max(answers, key=lambda answer: answer["score"])["label"] == candidates[direct])
    return mean(same)


def main(words: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="short")
    parser.add_argument("--data", help="folder with the idx files of Fashion-MNIST; from the Hub by default")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the preset's")
    parser.add_argument("--learning-rate", type=float, help="of all arms, instead of the best of each")
    parser.add_argument("--output", type=Path, default=Path("clip-moe-results"))
    args = parser.parse_args(words)
    preset = PRESETS[args.preset]
    settings = json.loads(json.dumps({**asdict(preset), "learning_rate": args.learning_rate or LEARNING_RATES}))
    known = args.output / "settings.json"
    del settings["seeds"]
    if known.exists() and json.loads(known.read_text(encoding="utf-8")) != settings:
        parser.error(f"{args.output} holds runs with other settings; choose another --output.")
    write_text(known, json.dumps(settings, indent=1) + "\n")
    rows: list[dict] = []
    for seed in args.seeds or preset.seeds:
        rows += run_seed(seed, args, preset)
        result = {"preset": args.preset, "settings": settings, "rows": rows}
        write_text(args.output / "results.json", json.dumps(result, indent=1) + "\n")
        write_text(args.output / "results.md", clip_moe_report.summarise(rows))
        clip_moe_report.draw(rows, args.output / "results.png")
    print((args.output / "results.md").read_text(encoding="utf-8"))
    return rows


if __name__ == "__main__":
    main()
