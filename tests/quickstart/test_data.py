import math

import pytest
import torch

from hf_moe.corpora import Corpus
from hf_moe.quickstart.data import TokenBlocks, held_out_perplexity, tokenize


def test_documents_are_packed_with_an_end_token_after_each(tiny_tokenizer):
    corpus = Corpus("x", ("The river runs.", "A miller."), ("The old mill runs past the river.",))
    train, held_out = tokenize(corpus, tiny_tokenizer, 4, 8)
    first = tiny_tokenizer("The river runs.")["input_ids"]
    expected = [*first, tiny_tokenizer.eos_token_id, *tiny_tokenizer("A miller.")["input_ids"]]
    flat = train.flatten().tolist()
    assert flat[: len(expected)] == expected[: len(flat)]
    assert held_out.shape == (2, 4)


def test_held_out_blocks_are_spread_over_the_text(tiny_tokenizer):
    text = " ".join(str(number) for number in range(500))
    _, few = tokenize(Corpus("x", (text,), (text,)), tiny_tokenizer, 8, 24)
    _, all_blocks = tokenize(Corpus("x", (text,), (text,)), tiny_tokenizer, 8, 10**6)
    assert few.shape == (3, 8)
    assert torch.equal(few[[0, -1]], all_blocks[[0, -1]])


def test_a_short_text_is_named(tiny_tokenizer):
    with pytest.raises(ValueError, match=r"`notes` is too short.*--sequence-length"):
        tokenize(Corpus("notes", ("The river runs past the old mill",), ("a",)), tiny_tokenizer, 8, 8)


def test_an_example_is_its_own_label():
    example = TokenBlocks(torch.arange(6).view(2, 3))[1]
    assert torch.equal(example["input_ids"], torch.tensor([3, 4, 5]))
    assert torch.equal(example["labels"], example["input_ids"])


def test_perplexity_is_that_of_the_models_own_loss(tiny_llama, generator):
    blocks = torch.randint(3, 384, (6, 16), generator=generator)
    tiny_llama.train()
    measured = held_out_perplexity(tiny_llama, blocks, "test", batch_size=4)
    assert tiny_llama.training
    with torch.no_grad():
        loss = tiny_llama.eval()(input_ids=blocks, labels=blocks).loss.item()
    assert measured == pytest.approx(math.exp(loss), rel=1e-5)
