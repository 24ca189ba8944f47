import torch

from hf_moe.corpora import load_corpus
from hf_moe.quickstart.data import held_out_perplexity, tokenize


def test_the_unpacked_weights_are_the_real_model(smollm2):
    model, tokenizer = smollm2
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "The capital of France is Paris" in tokenizer.decode(output[0])


def test_real_text_has_a_real_perplexity(smollm2):
    model, tokenizer = smollm2
    _, held_out = tokenize(load_corpus("reference", max_characters=100_000), tokenizer, 128, 512)
    perplexity = held_out_perplexity(model, held_out, "test")
    shuffled = held_out[:, torch.randperm(128, generator=torch.Generator().manual_seed(0))]
    assert 5 < perplexity < 40
    assert held_out_perplexity(model, shuffled, "test") > 10 * perplexity
