"""Run by `test_distributed_callback.py` in two processes: what each rank logs, and what both saw together, as JSON."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from common.tiny_families import tiny_model
from transformers import Trainer, TrainingArguments

from hf_moe.reporting import ExpertLoadCallback
from hf_moe.reporting.callback import TrainingRecorder


def main(folder: Path) -> None:
    args = TrainingArguments(
        folder / "run",
        per_device_train_batch_size=2,
        max_steps=2,
        logging_steps=2,
        learning_rate=0.0,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        dataloader_drop_last=True,
        ddp_find_unused_parameters=False,
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 384, (8, 6), generator=generator)
    rows = [{"input_ids": row, "labels": row.clone()} for row in ids]
    model = tiny_model("mixtral", num_hidden_layers=2)
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[ExpertLoadCallback()])
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    # Two ranks, two steps of two rows: together the whole data once.
    recorder = TrainingRecorder(model)
    model.train()(input_ids=ids, use_cache=False)
    summary = recorder.stats.compute()
    recorder.close()
    result = {
        "logged": {key: value for key, value in logged.items() if key.startswith("routing/")},
        "expected": {f"routing/{key}": value for key, value in summary.scalars().items()},
    }
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
