"""Perplexity through the stock Trainer."""

import math

import pytest
import torch
from common.tiny_families import tiny_model
from transformers import Trainer, TrainingArguments

from hf_moe.metrics import causal_lm_metrics, keep_token_losses


def test_trainer_reports_perplexity_without_router_losses(tmp_path, generator):
    model = tiny_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    rows = [{"input_ids": ids, "labels": ids.clone()} for ids in torch.randint(3, 384, (3, 12), generator=generator)]
    rows[0]["labels"][4:] = -100
    args = TrainingArguments(
        tmp_path, per_device_eval_batch_size=2, report_to="none", use_cpu=True, disable_tqdm=True, seed=0
    )
    trainer = Trainer(
        model,
        args,
        eval_dataset=rows,
        preprocess_logits_for_metrics=keep_token_losses,
        compute_metrics=causal_lm_metrics,
    )
    metrics = trainer.evaluate()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=row["input_ids"][None]).logits
            total += torch.nn.functional.cross_entropy(logits[0, :-1], row["labels"][1:], reduction="sum").item()
            tokens += int((row["labels"][1:] != -100).sum())
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert metrics["eval_nll"] < metrics["eval_loss"]  # the loss holds 0.5 x the router loss


def test_outputs_without_token_logits_are_refused():
    with pytest.raises(ValueError, match="causal language models"):
        keep_token_losses((torch.tensor(1.0), torch.zeros(2, 5)), torch.zeros(2, 4, dtype=torch.int64))
