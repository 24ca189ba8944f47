"""What is refused: before anything runs, by name, and with nothing left on the model."""

import math

import pytest
import torch
from common.decoding import prompt, spread_model
from transformers import LogitsProcessor

import hf_moe
from hf_moe import SelfContrast, scmoe_generate


@pytest.fixture(scope="module")
def model():
    return spread_model("mixtral")


def hooks(model):
    return sum(
        len(getattr(module, name))
        for module in model.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": -0.1}, "`beta` must be at least 0, got -0.1"),
        ({"beta": math.nan}, "`beta` must be finite, got nan"),
        ({"alpha": 1.5}, "`alpha` must be between 0 and 1, got 1.5"),
        ({"alpha": -1}, "`alpha` must be between 0 and 1, got -1"),
        ({"strong_temperature": 0}, "`strong_temperature` must be above 0, got 0"),
        ({"weak_temperature": -2.0}, "`weak_temperature` must be above 0, got -2.0"),
        ({"mode": "both"}, r"`mode` must be one of \['auto', 'fused', 'separate'\], got 'both'"),
        ({"weak": "rank:0"}, '`weak` must be "rank:k"'),
        ({"weak_weights": "raw"}, "`weak_weights` must be one of"),
        ({"seed": 1}, "`seed` and `generator` are for `weak=\"random:r\"`, got `weak='rank:2'`"),
        ({"weak": "random:1", "seed": 1, "generator": torch.Generator()}, "`seed` and `generator` exclude each other"),
    ],
)
def test_a_bad_value_is_refused_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        SelfContrast(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": "0.5"}, "`beta` must be a number, got '0.5'"),
        ({"alpha": True}, "`alpha` must be a number, got True"),
        ({"streamer": 3}, "`streamer` must have methods `put` and `end`, got int"),
        ({"synced_gpus": 1}, "`synced_gpus` must be True, False or None, got 1"),
        ({"weak": "random:1", "seed": 1.0}, "`seed` must be an integer, got 1.0"),
        ({"weak": "random:1", "generator": 7}, "`generator` must be a torch.Generator, got int"),
        ({"weak": 2}, "`weak` must be a string"),
    ],
)
def test_a_wrong_type_is_refused_at_construction(arguments, message):
    with pytest.raises(TypeError, match=message):
        SelfContrast(**arguments)


@pytest.mark.parametrize(
    ("decoder", "arguments", "message"),
    [
        (SelfContrast(weak="rank:9"), {}, r'`weak="rank:9"` needs 9 experts, and `model.layers.0.mlp` has 8'),
        (SelfContrast(weak="top:9"), {}, r'`weak="top:9"` needs 9 experts'),
        (SelfContrast(weak="random:9"), {}, r'`weak="random:9"` needs 9 experts'),
        (SelfContrast(), {"num_beams": 2}, "`num_beams` must be 1 with self-contrast decoding, got 2"),
        (SelfContrast(), {"prompt_lookup_num_tokens": 3}, "cannot run with an assistant.*`prompt_lookup_num_tokens`"),
        (SelfContrast(), {"assistant_early_exit": 1}, "cannot run with an assistant"),
        (SelfContrast(), {"penalty_alpha": 0.6, "top_k": 4}, "ask for 'contrastive_search'"),
        (SelfContrast(), {"dola_layers": "high"}, "ask for 'dola_generation'"),
    ],
)
def test_a_call_that_cannot_be_is_refused_before_anything_runs(model, decoder, arguments, message):
    ran = []
    handle = model.register_forward_pre_hook(lambda *_: ran.append(True))
    before = hooks(model)
    try:
        with pytest.raises(ValueError, match=message):
            model.generate(prompt(), max_new_tokens=3, do_sample=False, custom_generate=decoder, **arguments)
    finally:
        handle.remove()
    assert not ran and hooks(model) == before - 1


def test_an_assistant_model_is_refused_by_callable_and_helper(model):
    with pytest.raises(ValueError, match=r"cannot run with an assistant. Remove `assistant_model`"):
        model.generate(prompt(), max_new_tokens=3, assistant_model=model, custom_generate=SelfContrast())
    with pytest.raises(ValueError, match=r"cannot run with an assistant. Remove `assistant_model`"):
        scmoe_generate(model, prompt(), max_new_tokens=3, assistant_model=model)


def test_a_dense_model_is_refused_before_anything_runs(tiny_llama):
    tiny_llama.register_forward_pre_hook(lambda *_: pytest.fail("ran"))
    with pytest.raises(ValueError, match=r"`model` \(LlamaForCausalLM\) has no MoE layer.*hf_moe.upcycle"):
        tiny_llama.generate(prompt(), max_new_tokens=3, custom_generate=SelfContrast())


def test_an_encoder_decoder_is_refused():
    from hf_moe.generation.refusals import check_mode

    class Seq2Seq:
        config = type("Config", (), {"is_encoder_decoder": True})

    with pytest.raises(ValueError, match=r"`model` \(Seq2Seq\) is an encoder-decoder"):
        check_mode(Seq2Seq(), None)


@pytest.mark.parametrize("mode", ["separate", "fused"])
@pytest.mark.parametrize("where", ["processor", "streamer", "forward"])
def test_an_exception_leaves_nothing_on_the_model(model, mode, where):
    class Stop(Exception):
        pass

    def fail(*_, **__):
        raise Stop

    class Processor(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return fail() if where == "processor" else scores

    streamer = type("Streamer", (), {"put": fail if where == "streamer" else print, "end": print})()
    expected = model(prompt()).logits
    before = hooks(model)
    calls = []
    layer = model.model.layers[2].mlp.experts
    handle = layer.register_forward_hook(
        lambda *_: (calls.append(1), fail() if where == "forward" and len(calls) == 4 else None)[1]
    )
    with pytest.raises(Stop):
        scmoe_generate(
            model, prompt(), mode=mode, streamer=streamer, logits_processor=[Processor()], max_new_tokens=6,
            do_sample=False,
        )  # fmt: skip
    handle.remove()
    assert hooks(model) == before
    assert torch.equal(model(prompt()).logits, expected)


def test_the_public_names_are_at_the_top():
    assert hf_moe.SelfContrast is hf_moe.generation.SelfContrast
    assert {"SelfContrast", "scmoe_generate", "generation"} <= set(hf_moe.__all__)
