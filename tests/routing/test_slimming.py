"""Another number of experts per token: set, taken back, refused where a router decides it."""

import pytest
import torch
from common.tiny_training import build, third_party_warnings, tiny_moe, token_rows

from hf_moe import MoeLlamaForCausalLM
from hf_moe.routing import num_experts_per_tok, set_num_experts_per_tok
from hf_moe.trainers import evaluate_at_k


pytestmark = third_party_warnings


@pytest.mark.parametrize("router_type", ["fixed_random", "softmax_topk"])
def test_any_k_can_be_set_and_is_taken_back_exactly(router_type, generator):
    model = tiny_moe(router_type=router_type, router_aux_loss_coef=0.0).eval()
    ids = torch.randint(3, 100, (2, 6), generator=generator)
    before = model(ids).logits
    for k in (1, 3, 4):
        with num_experts_per_tok(model, k):
            out = model(ids, output_router_logits=True)
            assert model.config.num_experts_per_tok == k
        assert all(((index < 4).sum(-1) == k).all() for index in out.router_indices)
        assert not torch.allclose(out.logits, before)
    assert torch.equal(model(ids).logits, before) and model.config.num_experts_per_tok == 2


def test_a_model_is_saved_with_the_k_it_has(tmp_path, generator):
    model = tiny_moe(router_type="fixed_random").eval()
    set_num_experts_per_tok(model, 3)
    model.save_pretrained(tmp_path)
    again = MoeLlamaForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(3, 100, (2, 6), generator=generator)
    assert again.config.num_experts_per_tok == 3
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("router", "k", "message"),
    [
        ({"router_type": "fixed_random"}, 5, "`k` must be between 1 and 4, .* got 5"),
        ({"router_type": "fixed_random", "router_config": {"max_experts": 3}}, 4, "between 1 and 3"),
        ({"router_type": "softmax_topk"}, 0, "`k` must be between 1 and 4, .* got 0"),
        ({"router_type": "top_p"}, 2, "`router_type='top_p'` does not choose a fixed number of experts"),
        ({"router_type": "comet"}, 1, "`router_type='comet'` does not choose a fixed number"),
        ({"router_type": "hash"}, 1, "`router_type='hash'` does not choose a fixed number"),
    ],
)
def test_what_cannot_be_set_is_refused_and_changes_nothing(router, k, message):
    model = tiny_moe(**router)
    with pytest.raises(ValueError, match=message), num_experts_per_tok(model, k):
        pass
    assert model.config.num_experts_per_tok == 2


def test_a_model_without_our_routers_is_sent_elsewhere():
    with pytest.raises(ValueError, match=r"has no router of hf_moe\. Use `hf_moe\.routing_override"):
        set_num_experts_per_tok(torch.nn.Linear(2, 2), 1)


def test_the_curve_of_a_trainer_and_of_a_model(tmp_path):
    model = tiny_moe(router_type="fixed_random", router_aux_loss_coef=0.0)
    rows = token_rows(4, pad=False)
    trainer = build("trainer", tmp_path, model, data=rows, trainer={"eval_dataset": rows})
    trainer.train()
    curve = evaluate_at_k(trainer, (1, 2, 4))
    assert list(curve) == [1, 2, 4] and len({metrics["eval_loss"] for metrics in curve.values()}) == 3
    assert trainer.evaluate()["eval_loss"] == curve[2]["eval_loss"]
    seen = evaluate_at_k(model, (1, 4), lambda m: int(m.model.layers[0].mlp.gate.k))
    assert seen == {1: 1, 4: 4}
    with pytest.raises(ValueError, match="`evaluate` is missing"):
        evaluate_at_k(model, (1,))
