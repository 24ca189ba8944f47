"""Denoising and translation through one loss, and the balance losses of both stacks in a Trainer."""

import importlib
import json
import math

import pytest
import torch
from common.tiny_training import third_party_warnings
from datasets import Dataset
from transformers import AutoModelForSeq2SeqLM, Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_moe import MoeT5Config, MoeT5ForConditionalGeneration
from hf_moe.trainers import (
    DenoisingCollator,
    MoeSeq2SeqTrainer,
    MoeSeq2SeqTrainingArguments,
    fill_spans,
    interleave_tasks,
    mask_spans,
    temperature_sampling,
)


pytestmark = third_party_warnings

SENTINELS = list(range(900, 1000))


class Tokenizer:
    pad_token_id, eos_token_id = 0, 1

    @staticmethod
    def get_vocab():
        return {f"<extra_id_{i}>": 900 + i for i in range(100)}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny_t5(**changes):
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MoeT5Config(
            **{**sizes, "num_experts": 4, "dropout_rate": 0.0, "decoder_start_token_id": 0, **changes}
        )
        return MoeT5ForConditionalGeneration(config)


def rows(count=8):
    g = generator(1)
    return [
        {"input_ids": torch.randint(3, 60, (3 + i % 4,), generator=g).tolist(),
         "labels": torch.randint(3, 60, (2 + (i * 3) % 5,), generator=g).tolist()}
        for i in range(count)
    ]  # fmt: skip


def collate(features):
    return DenoisingCollator(Tokenizer())(features)


# -- masking ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("length", [0, 1, 2, 7, 40, 300])
@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.35, 0.9, 1.0])
def test_filled_sentinels_give_the_text_again(length, ratio):
    ids = list(range(10, 10 + length))
    for seed in range(5):
        masked = mask_spans(ids, SENTINELS, ratio, generator=generator(seed))
        assert fill_spans(masked, SENTINELS) == ids
        assert sum(map(len, masked.spans)) == round(ratio * length)
        assert [t for t in masked.source if t >= 900] == SENTINELS[: len(masked.spans)]
        neighbours = zip(masked.source, masked.source[1:], strict=False)
        assert not any(a >= 900 and b >= 900 for a, b in neighbours)  # else two spans would be one


def test_few_sentinels_make_spans_longer():
    masked = mask_spans(list(range(100)), [900, 901], 0.5, generator=generator())
    assert len(masked.spans) == 2 and sum(map(len, masked.spans)) == 50
    assert fill_spans(masked, [900, 901]) == list(range(100))


def test_span_lengths_and_places_follow_their_distributions():
    lengths, counts = [], torch.zeros(50)
    g = generator()
    for _ in range(400):
        masked = mask_spans(list(range(50)), SENTINELS, 0.35, 3.5, g)
        lengths += [len(span) for span in masked.spans[:-1]]  # the last one is cut to the number wanted
        counts[torch.tensor([t for span in masked.spans for t in span])] += 1
    poisson = torch.distributions.Poisson(3.5)
    expected = 3.5 + poisson.log_prob(torch.tensor(0.0)).exp().item()  # empty ones count as one
    assert abs(sum(lengths) / len(lengths) - expected) < 0.25
    assert (counts / 400 - 0.35).abs().mean() < 0.05 and counts.min() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"mask_ratio": 1.5}, "`mask_ratio`"), ({"mean_span": 0}, "`mean_span`"), ({"sentinels": []}, "`sentinels`")],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mask_spans(**{"ids": [1, 2], "sentinels": SENTINELS, **arguments})


# -- collator --------------------------------------------------------------------------------------------------------
def test_one_batch_holds_both_tasks():
    collator = DenoisingCollator(Tokenizer(), {"en": 800, "de": 801}, generator=generator())
    text = list(range(10, 30))
    batch = collator(
        [{"input_ids": text, "labels": None, "language": "de"},
         {"input_ids": [5, 6], "labels": [7, 8, 9], "language": "en"}]
    )  # fmt: skip
    assert batch["labels"][0].tolist() == [801, *text, 1]  # the clean text behind its tag
    assert batch["labels"][1].tolist() == [800, 7, 8, 9, 1] + [-100] * 17
    assert batch["input_ids"][1].tolist()[:3] == [5, 6, 1] and batch["attention_mask"][1].sum() == 3
    source = batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist()
    kept = [t for t in source if 10 <= t < 30]
    assert len(kept) == 13 and 900 in source  # 35 % of 20 are masked


def test_spans_as_targets_fill_the_sentinels_of_the_source():
    collator = DenoisingCollator(Tokenizer(), target="spans", generator=generator())
    text = list(range(10, 40))
    source, target = collator.row({"input_ids": text})
    spans, current = {}, None
    for token in target[:-1]:
        if token >= 900:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    assert [t for s in source[:-1] for t in spans.get(s, [s])] == text


def test_rows_are_cut_with_their_special_tokens():
    collator = DenoisingCollator(Tokenizer(), {"de": 801}, max_length=8, generator=generator())
    for feature in ({"input_ids": list(range(10, 60))}, {"input_ids": list(range(30)), "labels": list(range(30))}):
        source, target = collator.row({**feature, "language": "de"})
        assert len(source) <= 8 and len(target) == 8 and source[-1] == target[-1] == 1 and target[0] == 801


def test_what_a_collator_lacks_is_named():
    with pytest.raises(ValueError, match="`target` must be"):
        DenoisingCollator(Tokenizer(), target="words")
    with pytest.raises(ValueError, match=r"`language_tags` has \['en'\]"):
        DenoisingCollator(Tokenizer(), {"en": 800})([{"input_ids": [5], "language": "fr"}])
    bare = Tokenizer()
    bare.get_vocab = dict
    with pytest.raises(ValueError, match="no sentinels"):
        DenoisingCollator(bare)
    bare.pad_token_id = None
    with pytest.raises(ValueError, match="no padding token"):
        DenoisingCollator(bare)


# -- sampling --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("temperature", "expected"), [(1, (0.9, 0.1)), (math.inf, (0.5, 0.5)), (2, (0.75, 0.25))])
def test_temperature_sampling(temperature, expected):
    assert temperature_sampling([9, 1], temperature) == pytest.approx(expected)


def test_sampling_refuses_what_has_no_meaning():
    for sizes, temperature in (([], 1), ([1, 0], 1), ([1, 2], 0.5)):
        with pytest.raises(ValueError, match="must"):
            temperature_sampling(sizes, temperature)


def test_small_data_sets_come_up_as_often_as_they_should():
    large = Dataset.from_dict({"input_ids": [[1]] * 900})
    small = Dataset.from_dict({"input_ids": [[2]] * 100})
    drawn = interleave_tasks({"large": large, "small": small}, temperature=2)
    share = sum(row["input_ids"] == [2] for row in drawn) / len(drawn)
    assert abs(share - 0.25) < 0.05


# -- trainer ---------------------------------------------------------------------------------------------------------
def weights_after_a_step(tmp_path, batch_size, accumulation, trainer_class=MoeSeq2SeqTrainer, **changes):
    model = tiny_t5(**changes)
    arguments = MoeSeq2SeqTrainingArguments if trainer_class is MoeSeq2SeqTrainer else Seq2SeqTrainingArguments
    args = arguments(
        tmp_path / f"{batch_size}",
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = trainer_class(model, args, train_dataset=rows(), data_collator=collate)
    trainer.train()
    return model.state_dict(), trainer.state.log_history


def test_an_optimizer_step_does_not_depend_on_accumulation(tmp_path):
    # Linear in the tokens, so that equal sums are equal gradients: the z-loss of both stacks, and the cross-entropy.
    changes = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 1.0}
    whole, _ = weights_after_a_step(tmp_path, 8, 1, **changes)
    parts, _ = weights_after_a_step(tmp_path, 2, 4, **changes)
    plain, _ = weights_after_a_step(tmp_path, 8, 1, router_aux_loss_coef=0.0)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    for stack in ("encoder.block.0.layer.1", "decoder.block.0.layer.2"):  # and each stack's loss is in it
        name = f"{stack}.mlp.gate.weight"
        assert (whole[name] - plain[name]).abs().max() > 1e-3


def test_the_trainer_adds_what_the_model_itself_would(tmp_path):
    ours, log = weights_after_a_step(tmp_path, 8, 1, router_aux_loss_coef=0.5)
    stock, _ = weights_after_a_step(tmp_path, 8, 1, Seq2SeqTrainer, router_aux_loss_coef=0.5)
    for name, tensor in ours.items():
        torch.testing.assert_close(stock[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert 0.9 < log[0]["aux_loss"] < 4  # a mean over the stacks


def test_predictions_may_be_generated(tmp_path):
    args = MoeSeq2SeqTrainingArguments(
        tmp_path,
        predict_with_generate=True,
        generation_max_length=5,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = MoeSeq2SeqTrainer(tiny_t5(output_router_logits=True), args, data_collator=collate)
    outputs = trainer.predict(rows(3))
    assert outputs.predictions.shape[0] == 3 and "test_loss" in outputs.metrics


# -- script ----------------------------------------------------------------------------------------------------------
def test_the_script_trains_on_text_and_pairs(tmp_path, tiny_tokenizer):
    tiny_t5(vocab_size=len(tiny_tokenizer)).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "en.txt").write_text("one two three four five\nsix seven\n\neight nine ten\n")
    pairs = [{"en": "one two", "de": "eins zwei"}, {"en": "three", "de": "drei"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    script = importlib.import_module("hf_moe.trainers.scripts.multitask")
    words = ["--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    words += ["--monolingual", f"en={tmp_path / 'en.txt'}", "--parallel", f"en-de={tmp_path / 'pairs.jsonl'}"]
    words += ["--max_steps", "2", "--per_device_train_batch_size", "2", "--use_cpu", "True", "--report_to", "none"]
    words += ["--logging_steps", "1", "--router_z_loss_coef", "0.001", "--disable_tqdm", "True"]
    script.main(*script.make_parser().parse_args_and_config(words))
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    tokenizer = type(tiny_tokenizer).from_pretrained(tmp_path / "out")
    assert model.config.model_type == "moe_t5" and model.config.router_z_loss_coef == 0.001
    assert {"<2en>", "<2de>", "<extra_id_0>"} <= set(tokenizer.get_vocab())
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    logs = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert all(log["aux_loss"] > 0 and log["router_z_loss"] >= 0 for log in logs if "loss" in log)
    with pytest.raises(ValueError, match="no data to train on"):
        script.main(*script.make_parser().parse_args_and_config(words[:4] + words[8:]))
    with pytest.raises(ValueError, match="must have the form LANGUAGE=FILE"):
        script._parse("en-de=x", "monolingual")
