"""From tuned models to one Uni-MoE."""

import copy

import pytest
import torch
from common.tiny_llava import TEXT
from common.tiny_uni_moe import AUDIO, FORMER, QUERIES, SPEECH, TOKENS, VISION, inputs_of, prompt, uni_moe
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperForConditionalGeneration,
)

from hf_moe import UniMoeForConditionalGeneration, combine_uni_moe, upcycle, upcycle_uni_moe
from hf_moe.upcycling import FromModels


IDS = {f"{name}_token_id": token for name, token in TOKENS.items()}
FIELDS = {**IDS, "num_query_tokens": QUERIES, "audio_connector": {"kind": "qformer", "config": FORMER}}


def build(config, seed: int = 0, auto=AutoModel):
    config = dict(config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return auto.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).eval()


def llama(seed: int = 0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**TEXT)).eval()


def tuned(base, seed):
    """A fine-tune that differs in its feed-forwards."""
    model, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        for parameter in layer.mlp.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def encoders():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        fields = {name: value for name, value in SPEECH.items() if name != "model_type"}
        whisper = WhisperForConditionalGeneration(AutoConfig.for_model("whisper", **fields)).eval()
    return {"vision_encoder": build(VISION), "speech_model": whisper, "audio_encoder": build(AUDIO)}


@torch.no_grad()
def test_experts_come_from_models_tuned_on_different_modalities(tmp_path):
    base = llama()
    models, parts = [tuned(base, seed) for seed in (1, 2)], encoders()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    moe, report = upcycle_uni_moe(base, 2, 1, experts=FromModels(models), config_fields=FIELDS, **parts)
    assert type(moe) is UniMoeForConditionalGeneration and not report.predicted_exact
    assert moe.config.num_experts == 2 and moe.config.moe_layer_indices == [0, 2]
    for index in (0, 2):
        bank = moe.model.language_model.layers[index].mlp.experts
        for e, model in enumerate(models):
            assert torch.equal(bank.down_proj[e], model.model.layers[index].mlp.down_proj.weight)
    dense = moe.model.language_model.layers[1].mlp.up_proj.weight
    assert torch.equal(dense, base.model.layers[1].mlp.up_proj.weight)
    whisper = parts["speech_model"].model
    assert torch.equal(moe.model.speech_encoder.conv1.weight, whisper.encoder.conv1.weight)
    own = moe.model.speech_connector.decoder.layers[0].fc1.weight
    assert torch.equal(own, whisper.decoder.layers[0].fc1.weight) and own is not whisper.decoder.layers[0].fc1.weight
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    inputs = inputs_of(2, "speech", "image", "video", "audio", 3)
    moe.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, moe(**inputs).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_copies_keep_the_dense_logits_and_a_sparse_model_stays_as_it_is():
    base, ids = llama(), prompt(12)
    fields = {"speech_token_id": TOKENS["speech"]}
    moe, report = upcycle_uni_moe(base, speech_model=encoders()["speech_model"], config_fields=fields)
    assert report.predicted_exact and report.measured.max_difference <= 1e-5
    torch.testing.assert_close(moe(input_ids=ids).logits, base(ids).logits, rtol=0, atol=1e-5)
    sparse, _ = upcycle(base, num_experts=2, top_k=1, target="moe_llama")
    again, report = upcycle_uni_moe(sparse)
    assert report is None
    torch.testing.assert_close(again(input_ids=ids).logits, sparse(ids).logits, rtol=0, atol=1e-5)


def single(modalities, seed):
    """A "dense" model of phase 2: one expert."""
    model = uni_moe(modalities, num_experts=1, num_experts_per_tok=1)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def test_separately_tuned_models_become_experts_of_one():
    image, speech = single(("image",), 1), single(("speech",), 2)
    both = combine_uni_moe([image, speech], num_experts_per_tok=1)
    assert both.config.token_ids == {"image": TOKENS["image"], "speech": TOKENS["speech"]}
    for (_, block), *others in zip(both.moe_blocks(), image.moe_blocks(), speech.moe_blocks(), strict=True):
        for e, (_, other) in enumerate(others):
            assert torch.equal(block.experts.gate_up_proj[e], other.experts.gate_up_proj[0])
        block.gate.weight.zero_()  # ties go to the first expert
    inputs = inputs_of(2, "image", 3)
    torch.testing.assert_close(both(**inputs).logits, image(**inputs).logits, rtol=0, atol=1e-5)
    values = inputs_of("speech")["input_features"]
    torch.testing.assert_close(both.model.encode("speech", values), speech.model.encode("speech", values))


@torch.no_grad()
def test_half_precision_and_tied_embeddings_stay_and_routers_are_in_float32():
    base = LlamaForCausalLM(LlamaConfig(**{**TEXT, "tie_word_embeddings": True})).to(torch.bfloat16).eval()
    fields = {"speech_token_id": TOKENS["speech"]}
    whisper = encoders()["speech_model"].model
    moe, _ = upcycle_uni_moe(base, num_experts=1, top_k=1, speech_model=whisper, config_fields=fields, check=False)
    both = combine_uni_moe([moe, moe])
    for model in (moe, both):
        assert model.lm_head.weight is model.get_input_embeddings().weight and model.dtype == torch.bfloat16
        dtypes = {name: p.dtype for name, p in model.named_parameters()}
        single = {name for name, dtype in dtypes.items() if dtype == torch.float32}
        assert single == {name for name in dtypes if ".mlp.gate." in name}
    inputs = inputs_of(3)
    torch.testing.assert_close(both(**inputs).logits, moe(**inputs).logits, rtol=0.05, atol=0.05)
    speech = {"input_ids": torch.full((1, 50), TOKENS["speech"]), "input_features": torch.zeros(1, 8, 40)}
    assert both(**speech).logits.isfinite().all()


def test_models_of_different_forms_are_refused():
    with pytest.raises(ValueError, match=r"differ in \['intermediate_size', 'moe_intermediate_size'"):
        combine_uni_moe([uni_moe(("image",)), uni_moe(("image",), text={"intermediate_size": 40})])
    with pytest.raises(ValueError, match=r"must be `uni_moe`.*LlamaForCausalLM.*upcycle_uni_moe"):
        combine_uni_moe([llama()])
    with pytest.raises(ValueError, match="at least one model"):
        combine_uni_moe([])


def test_a_connector_may_come_from_the_model_tuned_on_its_modality():
    models = [uni_moe(seed=seed, num_experts=1, num_experts_per_tok=1) for seed in (0, 1)]
    combined = combine_uni_moe(models, connectors={"speech": 1})
    states = [model.state_dict() for model in models]
    for name, value in combined.state_dict().items():
        if "_connector." in name:
            assert torch.equal(value, states["speech_connector" in name][name])
    for chosen, message in (
        ({"speech": 2}, "there are 2 models"),
        ({"video": 0}, r"model 0 has \['audio', 'image', "),
    ):
        with pytest.raises(ValueError, match=message):
            combine_uni_moe(models, connectors=chosen)
