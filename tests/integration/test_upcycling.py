"""Real weights: every recipe that promises the dense function keeps it, under every experts implementation."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_moe import upcycle
from hf_moe.upcycling import Copy, Drop, MoePlusPlusTarget, Normal, Split, VirtualGroups, Zeros


LIMIT = 1e-4  # largest |difference of logits|, float32
TEXT = "The `with` statement is used to wrap the execution of a block."
# A sixth of the layers is enough to see a recipe fail; all of them are used once, below.
SOME = "every:6"
EXACT = {
    "copies": {"num_experts": 4, "top_k": 2},
    "copies, sigmoid weights": {"num_experts": 4, "top_k": 3, "weights": "sigmoid"},
    "permuted channels": {"num_experts": 4, "top_k": 2, "experts": Drop(0.0)},
    "virtual groups": {"num_experts": 4, "top_k": 2, "experts": VirtualGroups(2)},
    "neuron split, all experts": {"num_experts": 4, "top_k": 4, "experts": Split("random"), "router": Zeros()},
    "shared dense": {"num_experts": 4, "top_k": 2, "shared": "dense"},
    "shared part and virtual groups": {"num_experts": 4, "top_k": 2, "shared": 0.25, "experts": VirtualGroups(2)},
    "residual branch": {"num_experts": 4, "top_k": 1, "shared": "residual"},
}


@pytest.fixture(scope="module")
def batch(smollm2_session):
    return smollm2_session[1](TEXT, return_tensors="pt")


@pytest.fixture(scope="module")
def expected(smollm2_session, batch):
    with torch.no_grad():
        return smollm2_session[0].eval()(**batch).logits


def check(moe, batch, expected, limit=LIMIT):
    # batched_mm copies the weights of every expert for every token: the first tokens show what all would.
    for implementation, tokens in (("eager", None), ("grouped_mm", None), ("batched_mm", 4)):
        moe.set_experts_implementation(implementation)
        with torch.no_grad():
            logits = moe(**{name: tensor[:, :tokens] for name, tensor in batch.items()}).logits
        gap = (logits - expected[:, :tokens]).abs().max().item()
        assert gap <= limit, (implementation, gap)


@pytest.mark.parametrize("recipe", EXACT)
def test_an_exact_recipe_keeps_the_logits(smollm2, batch, expected, recipe):
    moe, report = upcycle(smollm2[0], layers=SOME, check=False, **EXACT[recipe])
    assert report.predicted_exact
    check(moe, batch, expected)


@pytest.mark.parametrize("target", [pytest.param("auto", marks=pytest.mark.slow), "moe_llama"])
def test_all_layers_keep_the_logits(smollm2, batch, expected, target, tmp_path):
    moe, report = upcycle(smollm2[0], num_experts=4, top_k=2, target=target)
    assert report.measured.max_difference <= LIMIT
    check(moe, batch, expected)
    moe.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    check(again, batch, expected)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(again.generate(**batch, **options), smollm2[0].generate(**batch, **options))


def test_moe_plus_plus_starts_near_the_dense_model(smollm2, batch, expected):
    model, tokenizer = smollm2
    moe, report = upcycle(
        model, num_experts=4, top_k=2, layers=SOME, target="moe_plus_plus", calibration=[TEXT], tokenizer=tokenizer
    )
    assert not report.predicted_exact
    with torch.no_grad():
        loss, dense_loss = (m(**batch, labels=batch["input_ids"]).loss.item() for m in (moe, model))
    assert abs(loss - dense_loss) < 0.05
    # A share of 0 keeps zero-computation experts out of the tokens the biases were set on.
    strict = MoePlusPlusTarget(zero_computation_share=0.0)
    moe, _ = upcycle(
        model, num_experts=4, top_k=2, layers=SOME, target=strict, router=Normal(0.02), experts=Copy(),
        calibration=[TEXT], tokenizer=tokenizer,
    )  # fmt: skip
    check(moe, batch, expected)
