"""What `generate` takes beside a prompt works with self-contrast decoding."""

import pytest
import torch
from common.decoding import prompt, spread_model
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from hf_moe import scmoe_generate
from hf_moe.generation import SelfContrast


MODES = ("separate", "fused")


class ListStreamer(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value)

    def end(self):
        self.ended += 1


def some_word(output, tokenizer):
    """A piece of the text generated in row 0: random tokens are mostly bytes that are no character alone."""
    texts = [tokenizer.decode(token) for token in output[0, 8:14]]
    return next(text for text in texts if text.isascii() and text.isprintable())


@pytest.fixture(scope="module")
def model():
    return spread_model("mixtral")


def generate(model, ids, mode="auto", beta=0.9, **kwargs):
    decoder = SelfContrast(beta=beta, alpha=0.1 if beta else 0, mode=mode)
    return model.generate(ids, custom_generate=decoder, **{"max_new_tokens": 6, "do_sample": False, **kwargs})


@pytest.mark.parametrize("mode", MODES)
def test_what_is_streamed_is_what_is_returned(model, mode):
    streamer = ListStreamer()
    output = scmoe_generate(model, prompt(), streamer=streamer, mode=mode, max_new_tokens=6, do_sample=False)
    assert torch.equal(torch.cat([value.view(-1) for value in streamer.values]), output[0])
    assert torch.equal(streamer.values[0], prompt()) and streamer.ended == 1 and len(streamer.values) == 7


def test_a_streamer_given_to_both_gets_the_prompt_once(model):
    streamer = ListStreamer()
    output = model.generate(
        prompt(), max_new_tokens=4, do_sample=False, streamer=streamer, custom_generate=SelfContrast(streamer=streamer)
    )
    assert torch.equal(torch.cat([value.view(-1) for value in streamer.values]), output[0]) and streamer.ended == 1


def test_a_streamer_given_to_generate_alone_is_refused_and_not_forgotten(model):
    with pytest.raises(ValueError, match=r"does not hand `streamer` to a `custom_generate` callable.*scmoe_generate"):
        generate(model, prompt(), streamer=ListStreamer())
    with pytest.raises(ValueError, match=r"does not hand `synced_gpus`"):
        generate(model, prompt(), synced_gpus=True)


def test_text_streams_without_the_prompt(model, tiny_tokenizer):
    streamer = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True)
    output = scmoe_generate(model, prompt(), streamer=streamer, max_new_tokens=6, do_sample=False)
    assert "".join(streamer) == tiny_tokenizer.decode(output[0, 7:])


@pytest.mark.parametrize("mode", MODES)
def test_a_stop_string_ends_its_row(model, tiny_tokenizer, mode):
    kwargs = {"mode": mode, "max_new_tokens": 8, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    free = scmoe_generate(model, prompt(2), **kwargs)
    stop = some_word(free, tiny_tokenizer)
    output = scmoe_generate(model, prompt(2), stop_strings=[stop], tokenizer=tiny_tokenizer, **kwargs)
    ends = next(n for n in range(8, 16) if stop in tiny_tokenizer.decode(free[0, 7:n]))
    assert ends < 15 and torch.equal(output[0, :ends], free[0, :ends])
    assert (output[0, ends:] == 0).all()  # padding


def test_stop_strings_of_a_generation_config_are_found_and_it_is_not_changed(model, tiny_tokenizer):
    from transformers import GenerationConfig

    free = scmoe_generate(model, prompt(), max_new_tokens=8, do_sample=False)
    stop = some_word(free, tiny_tokenizer)
    config = GenerationConfig(max_new_tokens=8, do_sample=False, stop_strings=[stop], pad_token_id=0)
    output = scmoe_generate(model, prompt(), generation_config=config, tokenizer=tiny_tokenizer)
    assert torch.equal(output, free[:, : output.shape[1]]) and output.shape[1] < 15
    assert config.stop_strings == [stop]
    model.generation_config.stop_strings = [stop]
    try:
        assert torch.equal(
            scmoe_generate(model, prompt(), max_new_tokens=8, do_sample=False, tokenizer=tiny_tokenizer), output
        )
    finally:
        model.generation_config.stop_strings = None


def test_stop_strings_need_the_tokenizer(model):
    with pytest.raises(ValueError, match=r"`stop_strings='x'` needs `tokenizer`"):
        scmoe_generate(model, prompt(), stop_strings="x")


@pytest.mark.parametrize("mode", MODES)
def test_processors_see_the_contrasted_scores(model, mode):
    seen = []

    class Spy(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(scores.clone())
            return scores.index_fill(1, scores[:1].argmax(-1), -torch.inf)  # ban row 0's best

    output = generate(
        model, prompt(), mode, logits_processor=[Spy()], return_dict_in_generate=True, output_logits=True,
        output_scores=True,
    )  # fmt: skip
    assert len(seen) == 6
    for step, before in enumerate(seen):
        expected = SelfContrast(beta=0.9).contrast(output.logits[step], output.weak_logits[step])
        torch.testing.assert_close(before, expected)
        assert output.scores[step][0, before[0].argmax()] == -torch.inf
        assert output.sequences[0, 7 + step] == output.scores[step][0].argmax() != before[0].argmax()


def test_a_processor_that_runs_the_model_sees_its_own_routing(model):
    indices = []

    class Runs(LogitsProcessor):
        def __call__(self, input_ids, scores):
            from hf_moe import record_routing

            with record_routing(model) as recorder:
                model(input_ids)
            indices.append(recorder.layers[0].top_k_index[0])
            return scores

    for mode in MODES:
        generate(model, prompt(), mode, logits_processor=[Runs()], max_new_tokens=2)
    assert [index.shape for index in indices] == [(7, 2), (8, 2)] * 2


@pytest.mark.parametrize("mode", MODES)
def test_without_contrast_sampling_is_plain_sampling(model, mode):
    kwargs = {"do_sample": True, "num_return_sequences": 3, "top_p": 0.9, "temperature": 1.5, "max_new_tokens": 6}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = model.generate(prompt(2), **kwargs)
        torch.manual_seed(3)
        output = generate(model, prompt(2), mode, beta=0, **kwargs)
    assert torch.equal(output, expected) and output.shape == (6, 13)


@pytest.mark.parametrize("mode", MODES)
def test_num_return_sequences_with_a_static_cache(model, mode):
    with torch.random.fork_rng():
        outputs = []
        for cache in ("dynamic", "static"):
            torch.manual_seed(3)
            outputs.append(
                generate(model, prompt(2), mode, do_sample=True, num_return_sequences=2, cache_implementation=cache)
            )
    assert torch.equal(*outputs) and outputs[0].shape == (4, 13)


@pytest.mark.parametrize("mode", MODES)
def test_the_end_of_sequence_is_never_banned_and_finished_rows_are_padded(model, mode):
    ids = prompt(3)
    free = generate(model, ids, mode, max_new_tokens=8)
    eos = int(free[0, 9])
    output = generate(model, ids, mode, max_new_tokens=8, eos_token_id=eos, pad_token_id=0)
    for row, unstopped in zip(output, free, strict=True):
        ends = (unstopped[7:] == eos).nonzero()
        end = 7 + int(ends[0]) + 1 if len(ends) else output.shape[1]
        assert torch.equal(row[:end], unstopped[:end]) and (row[end:] == 0).all()
    assert output[0, 7:10].tolist().count(eos) >= 1


def test_a_stopping_criterion_sees_the_scores(model):
    class AfterTwo(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            assert len(scores) == input_ids.shape[1] - 7
            return torch.full((input_ids.shape[0],), len(scores) == 2)

    output = generate(
        model, prompt(2), stopping_criteria=StoppingCriteriaList([AfterTwo()]), return_dict_in_generate=True,
        output_scores=True,
    )  # fmt: skip
    assert output.sequences.shape == (2, 9)


@pytest.mark.parametrize("mode", MODES)
def test_attentions_and_hidden_states_are_those_of_the_strong_stream(mode):
    model = spread_model("mixtral", attn_implementation="eager")
    kwargs = {"return_dict_in_generate": True, "output_attentions": True, "output_hidden_states": True}
    output = generate(model, prompt(2), mode, beta=0, **kwargs)
    plain = model.generate(prompt(2), max_new_tokens=6, do_sample=False, **kwargs)
    for name in ("attentions", "hidden_states"):
        assert len(output[name]) == 6
        for step, expected in zip(output[name], plain[name], strict=True):
            for tensor, same in zip(step, expected, strict=True):
                torch.testing.assert_close(tensor, same)


def test_the_helper_is_the_callable(model):
    mask = torch.ones(1, 7, dtype=torch.long)
    output = scmoe_generate(
        model, input_ids=prompt(), attention_mask=mask, beta=0.9, max_new_tokens=6, do_sample=False
    )
    assert torch.equal(output, generate(model, prompt()))


def test_the_helper_knows_peft_models(model):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(spread_model("mixtral"), LoraConfig(r=2, target_modules=["q_proj"]))
    output = scmoe_generate(wrapped, input_ids=prompt(), beta=0.9, max_new_tokens=6, do_sample=False)
    assert torch.equal(output, generate(model, prompt()))


@pytest.mark.parametrize("mode", MODES)
def test_forward_passes_for_other_processes_add_nothing(model, mode, monkeypatch):
    expected = generate(model, prompt(2), mode)
    seen = []

    def others_go_on(finished, synced_gpus, device):
        seen.append((finished, synced_gpus))
        return seen.count((True, True)) < 3

    monkeypatch.setattr(model, "_has_unfinished_sequences", others_go_on, raising=False)
    forwards = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    output = scmoe_generate(model, prompt(2), mode=mode, beta=0.9, synced_gpus=True, max_new_tokens=6, do_sample=False)
    handle.remove()
    assert torch.equal(output, expected)
    assert len(forwards) == (6 + 2) * (2 if mode == "separate" else 1)
