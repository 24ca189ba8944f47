"""Batches of running text and of facts, and the endless stream of ordinary text."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_moe.trainers import MixdaPromptCollator, MixdaTextCollator
from hf_moe.trainers.mixda_general import GeneralText


WORDS = "the capital of france is paris or lyon and rome italy no".split()


@pytest.fixture
def tokenizer():
    words = ["<pad>", "<mask>", "<unk>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", mask_token="<mask>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def words(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens([i for i in ids.tolist() if i >= 0]))


def test_the_object_of_a_fact_is_hidden_and_predicted(tokenizer):
    batch = MixdaPromptCollator(tokenizer)(
        [
            {"prompt": "the capital of france is {}", "targets": ["paris"], "other": 1},
            {"prompt": "{} is the capital of {} and no", "targets": ["rome no", "italy"]},
        ]
    )
    assert words(tokenizer, batch["input_ids"][0]) == "the capital of france is <mask> <pad> <pad> <pad>"
    assert words(tokenizer, batch["input_ids"][1]) == "<mask> <mask> is the capital of <mask> and no"
    assert words(tokenizer, batch["labels"][0]) == "paris" and words(tokenizer, batch["labels"][1]) == "rome no italy"
    assert batch["labels"][0].tolist().index(tokenizer.convert_tokens_to_ids("paris")) == 5
    assert batch["attention_mask"].sum(1).tolist() == [6, 9]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_causal_model_sees_the_object_and_is_asked_for_nothing_else(tokenizer, side):
    tokenizer.padding_side = side
    rows = [{"prompt": "the capital of france is {} or no", "targets": "paris"}, {"prompt": "{}", "targets": ["rome"]}]
    batch = MixdaPromptCollator(tokenizer, "causal")(rows)
    for row, text in ((0, "paris"), (1, "rome")):
        labelled = batch["labels"][row] >= 0
        assert words(tokenizer, batch["labels"][row]) == text
        assert torch.equal(batch["labels"][row][labelled], batch["input_ids"][row][labelled])
    assert words(tokenizer, batch["input_ids"][0]) == "the capital of france is paris or no"


def test_one_of_several_alternatives_is_drawn(tokenizer):
    torch.manual_seed(0)
    collator = MixdaPromptCollator(tokenizer)
    row = {"prompt": "no {} no", "targets": ["paris", "lyon"]}
    seen = {words(tokenizer, collator([row])["labels"][0]) for _ in range(20)}
    assert seen == {"paris", "lyon"}


def test_rows_that_cannot_be_asked_are_refused(tokenizer):
    collator = MixdaPromptCollator(tokenizer, max_length=3)
    for prompt, targets in (("paris", ["paris"]), ("{} {}", ["a", "b", "c"]), ("{}", []), ("{}", [""])):
        with pytest.raises(ValueError, match="`prompt` must have one"):
            collator([{"prompt": prompt, "targets": targets}])
    with pytest.raises(ValueError, match="`max_length=3` leaves nothing of the targets"):
        collator([{"prompt": "the capital of france is {}", "targets": ["paris"]}])
    with pytest.raises(ValueError, match="`objective` must be one of"):
        MixdaPromptCollator(tokenizer, None)
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="no mask token"):
        MixdaTextCollator(tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        MixdaTextCollator(tokenizer, "causal")


def test_of_the_chosen_tokens_most_are_masked_some_kept_and_a_few_random(tokenizer):
    torch.manual_seed(0)
    rows = [{"text": " ".join(WORDS * 20), "label": "x"} for _ in range(100)]
    plain = MixdaTextCollator(tokenizer, None)(rows)
    assert "labels" not in plain and set(plain) == {"input_ids", "attention_mask"}
    batch = MixdaTextCollator(tokenizer)(rows)
    chosen = batch["labels"] >= 0
    assert torch.equal(batch["labels"][chosen], plain["input_ids"][chosen])
    assert torch.equal(batch["input_ids"][~chosen], plain["input_ids"][~chosen])
    total = chosen.sum().item()
    assert total / chosen.numel() == pytest.approx(0.15, abs=0.01)
    masked = (batch["input_ids"][chosen] == tokenizer.mask_token_id).sum().item() / total
    kept = (batch["input_ids"][chosen] == plain["input_ids"][chosen]).sum().item() / total
    # a random token is the mask or the old one now and then
    assert masked == pytest.approx(0.85 + 0.05 / len(tokenizer), abs=0.015)
    assert kept == pytest.approx(0.10 + 0.05 / len(tokenizer), abs=0.015)


def test_text_is_tokenised_cut_and_padded(tokenizer):
    rows = [{"text": "the capital of france"}, {"text": "no"}]
    batch = MixdaTextCollator(tokenizer, "causal", max_length=3)(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist()[1][1:] == [-100, -100]
    encoded = [{"input_ids": [3, 4, 5], "attention_mask": [1, 1, 1]}, {"input_ids": [4], "attention_mask": [1]}]
    again = MixdaTextCollator(tokenizer, None)(encoded)
    assert again["input_ids"].tolist() == [[3, 4, 5], [4, 0, 0]]
    with pytest.raises(ValueError, match="Rows need `text` or `input_ids`"):
        MixdaTextCollator(tokenizer)([{"prompt": "no"}])


def test_the_stream_starts_over_in_another_order_and_can_be_entered_anywhere():
    stream = GeneralText(list(range(10)), list, seed=3)
    rounds = [[stream.index(position) for position in range(start, start + 10)] for start in (0, 10)]
    assert sorted(rounds[0]) == sorted(rounds[1]) == list(range(10)) and rounds[0] != rounds[1]
    batches = [stream.batch(4, number) for number in range(5)]
    assert [row for batch in batches for row in batch] == rounds[0] + rounds[1]
    assert GeneralText(list(range(10)), list, seed=3).batch(4, 3) == batches[3]
    assert GeneralText(list(range(10)), list, seed=4).batch(10, 0) != rounds[0]
    with pytest.raises(ValueError, match="`general_dataset` is empty"):
        GeneralText([], list)
    with pytest.raises(TypeError, match="`general_dataset` must have a length"):
        GeneralText(iter([1]), list)
