"""Run by `test_distributed_report.py` in two processes: what each rank logs of four texts, and of one, as JSON."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from common.tiny_families import tiny_model
from transformers import AutoTokenizer, Trainer, TrainingArguments

from hf_moe.reporting import RoutingReportCallback, routing_report, routing_shift, routing_snapshot


TEXTS = ["The river runs past the old mill.", "A miller kept 3 cats.", "def add(a, b): return a", "Boats come home."]


def main(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    results = {}
    for texts in (TEXTS, TEXTS[:1]):
        model = tiny_model("mixtral", num_hidden_layers=2)
        before = routing_snapshot(model, tokenizer, texts)
        args = TrainingArguments(
            folder / "run",
            per_device_train_batch_size=2,
            max_steps=2,
            logging_strategy="no",
            learning_rate=0.05,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            ddp_find_unused_parameters=True,
        )
        ids = torch.randint(3, 384, (8, 6), generator=torch.Generator().manual_seed(0))
        rows = [{"input_ids": row, "labels": row.clone()} for row in ids]
        trainer = Trainer(model, args, train_dataset=rows)
        callback = RoutingReportCallback(tokenizer, texts, output_dir="routing").attach(trainer)
        trainer.train()
        alone = routing_report(model, tokenizer, texts)
        shift = routing_shift(before, routing_snapshot(model, tokenizer, texts))
        logged = [entry for entry in trainer.state.log_history if "routing_probe/entropy" in entry][-1]
        results[len(texts)] = {
            "logged": {key.removeprefix("routing_probe/"): value for key, value in logged.items() if "/" in key},
            "expected": {**shift.metrics(), "class_shift": alone.metrics()["class_shift"]},
            "counts": [layer.counts for layer in callback.report.layers],
            "expected_counts": [layer.counts for layer in alone.layers],
            "coactivation": callback.report.layers[0].coactivation,
            "expected_coactivation": alone.layers[0].coactivation,
        }
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
