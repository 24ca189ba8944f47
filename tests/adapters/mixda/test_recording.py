"""What the sampling loss is computed from, and whom its gradients reach."""

import pytest
import torch
from common.mixda_models import IDS, MASK, perturb, tiny
from peft import get_peft_model

from hf_moe import MixdaConfig
from hf_moe.adapters.mixda import MixdaLayer, record_knowledge


def knowledge_model(family="bert", **fields):
    return get_peft_model(tiny(family), MixdaConfig(**({"domain_layers": [0, 1], "reduction": 8} | fields)))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "gpt2"])
def test_at_the_start_the_loss_is_the_networks_size_and_only_the_upper_map_learns(family):
    model = knowledge_model(family).train()
    with record_knowledge(model) as recorder:
        model(input_ids=IDS, attention_mask=MASK)
    pairs = recorder.pairs()
    assert len(pairs) == 2
    for output, knowledge in pairs:
        assert output.shape == (2, 6, 32) and not output.requires_grad and not knowledge.any()
    loss = recorder.loss()
    torch.testing.assert_close(loss, torch.stack([output.square().mean() for output, _ in pairs]).mean())
    loss.backward()
    # a loss that compared the adapted output with itself would be 0 and have no gradients
    assert loss > 0
    found = gradients(model)
    assert {name.rpartition("domain.")[2] for name in found} == {"up.weight", "up.bias"} and len(found) == 4


def test_pairs_are_what_the_network_and_the_adapter_give_and_gradients_stay_in_the_adapter():
    model = perturb(knowledge_model(domains=["a", "b"]))
    layers = [module for module in model.modules() if isinstance(module, MixdaLayer)]
    seen = []
    for layer in layers:
        layer.base_layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    with record_knowledge(model) as recorder:
        model(input_ids=IDS)
    pairs = recorder.pairs()
    expected = [
        (output, layer.cell("expert", "default")[domain](x))
        for layer, (x, output) in zip(layers, seen, strict=True)
        for domain in ("a", "b")
    ]
    assert len(pairs) == len(expected) == 4
    for pair, other in zip(pairs, expected, strict=True):
        torch.testing.assert_close(pair, other)
    recorder.loss().backward()
    assert {name.split("hfmoe_mixda_")[1].split(".")[0] for name in gradients(model)} == {"expert"}
    model.set_domains(["a"])
    assert len(recorder.pairs()) == 2


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_a_call_can_end_at_the_last_domain_adapter(family):
    model = perturb(knowledge_model(family, domain_layers=[0]))
    inputs = {"input_ids": IDS} | ({"labels": IDS} if family == "t5" else {})
    calls = []
    head = model.get_base_model().get_output_embeddings()
    head.register_forward_hook(lambda *_: calls.append(1))
    with record_knowledge(model) as whole, torch.no_grad():
        model(**inputs)
    with record_knowledge(model, stop=True) as part, torch.no_grad():
        model(**inputs)
    assert len(calls) == 1
    torch.testing.assert_close(part.pairs(), whole.pairs(), rtol=0, atol=0)
    model(**inputs)  # and nothing of it stays behind
    assert len(calls) == 2 and len(part.pairs()) == len(whole.pairs())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_neither_pairs_nor_gradients(reentrant):
    model = perturb(knowledge_model("llama")).train()

    def run():
        model.zero_grad()
        with record_knowledge(model) as recorder:
            loss = model(input_ids=IDS, labels=IDS).loss
        (0.5 * loss + recorder.loss()).backward()
        return len(recorder.pairs()), gradients(model)

    expected = run()
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    count, found = run()
    assert count == expected[0] == 2
    torch.testing.assert_close(found, expected[1])


def test_a_compiled_model_is_recorded_too():
    model = perturb(knowledge_model("llama"))
    with record_knowledge(model) as plain, torch.no_grad():
        model(input_ids=IDS)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(input_ids=IDS)
        with record_knowledge(compiled) as recorder:
            compiled(input_ids=IDS)
    torch.testing.assert_close(recorder.pairs(), plain.pairs())


def test_there_must_be_domain_adapters():
    with pytest.raises(ValueError, match="has no domain adapters"), record_knowledge(tiny("bert")):
        pass
    with pytest.raises(ValueError, match="'nobody'"), record_knowledge(knowledge_model(), "nobody"):
        pass
