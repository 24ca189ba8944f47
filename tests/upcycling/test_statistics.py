import pytest
import torch
from common.upcycling_toys import ids, tiny_dense

from hf_moe.upcycling.feed_forward import extract_feed_forward, locate_feed_forwards
from hf_moe.upcycling.statistics import calibration_batches, collect_statistics, random_batch


ALL = {"router_inputs", "activations", "taylor", "contribution"}


def inputs_of(model, site, batch):
    seen = []
    handle = site.module.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_statistics_are_those_of_the_tokens_seen(kind):
    model = tiny_dense(kind)
    sites = locate_feed_forwards(model)
    batches = [{"input_ids": ids(s)} for s in (0, 1)]
    stats = collect_statistics(model, sites, batches, ALL)
    for site in sites:
        ffn = extract_feed_forward(site.module)
        x = torch.cat([inputs_of(model, site, b) for b in batches])
        a = ffn.intermediate(x)
        found = stats[site.layer_idx]
        assert found.num_tokens == 40
        torch.testing.assert_close(found.router_inputs, x)
        torch.testing.assert_close(found.activations, a, rtol=0, atol=1e-6)
        expected = a.abs().mean(0) * ffn.down.norm(dim=0)
        torch.testing.assert_close(found.importance["contribution"], expected, rtol=1e-5, atol=1e-7)


def test_taylor_importance_is_activation_times_gradient():
    """Checked by finite differences: scaling one channel's activation by 1 - e changes the loss by -e a dL/da."""
    model = tiny_dense("llama")
    site = locate_feed_forwards(model)[1]
    input_ids = ids(length=2, batch=1)  # one label: only the first token's activation matters
    found = collect_statistics(model, [site], [{"input_ids": input_ids}], {"taylor"})[1].importance["taylor"]
    down = site.module.down_proj.weight

    @torch.no_grad()
    def loss(channel, factor):
        column = down[:, channel].clone()
        down[:, channel] = column * factor
        logits = model(input_ids).logits[0, 0].double()
        down[:, channel] = column
        return float(torch.nn.functional.cross_entropy(logits, input_ids[0, 1]))

    for channel in found.topk(4).indices.tolist():
        change = abs(loss(channel, 1.02) - loss(channel, 0.98)) / 0.04
        assert float(found[channel]) * 2 == pytest.approx(change, rel=0.02)  # a mean over two tokens


@pytest.mark.parametrize("frozen", [True, False])
def test_collecting_changes_nothing_in_the_model(frozen):
    model = tiny_dense("llama").train()
    model.requires_grad_(not frozen)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    stats = collect_statistics(model, locate_feed_forwards(model), [{"input_ids": ids()}], ALL)
    assert float(stats[0].importance["taylor"].max()) > 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad != frozen for p in model.parameters())
    assert model.training and not any(m._forward_pre_hooks for m in model.modules())


def test_a_frozen_model_gives_the_same_importance():
    model = tiny_dense("llama")
    sites = locate_feed_forwards(model)
    first = collect_statistics(model, sites, [{"input_ids": ids()}], {"taylor"})
    again = collect_statistics(model.requires_grad_(False), sites, [{"input_ids": ids()}], {"taylor"})
    for layer in (0, 1):
        torch.testing.assert_close(first[layer].importance["taylor"], again[layer].importance["taylor"])


def test_padding_is_left_out():
    model = tiny_dense("llama")
    sites = locate_feed_forwards(model)
    plain = ids(batch=1, length=6)
    padded = torch.cat([plain, torch.zeros(1, 4, dtype=torch.long)], dim=-1)
    mask = torch.tensor([[1] * 6 + [0] * 4])
    alone = collect_statistics(model, sites, [{"input_ids": plain}], ALL)[1]
    filled = collect_statistics(model, sites, [{"input_ids": padded, "attention_mask": mask}], ALL)[1]
    assert filled.num_tokens == 6
    torch.testing.assert_close(filled.router_inputs, alone.router_inputs, rtol=0, atol=1e-5)
    for name in ("taylor", "contribution"):
        torch.testing.assert_close(filled.importance[name], alone.importance[name], rtol=1e-3, atol=1e-6)


def test_a_model_without_loss_is_sent_to_the_other_measure():
    model = tiny_dense("llama", auto="AutoModel")
    with pytest.raises(ValueError, match=r'LlamaModel gives no loss.*"contribution"'):
        collect_statistics(model, locate_feed_forwards(model), [{"input_ids": ids()}], {"taylor"})


def test_calibration_takes_many_forms(tiny_tokenizer):
    text = "the cats kept the mice away"
    encoded = tiny_tokenizer(text, return_tensors="pt")["input_ids"]
    for given in (text, [text], encoded, [encoded], [encoded[0].tolist()], {"input_ids": encoded, "n": 3}):
        batches = calibration_batches(given, tiny_tokenizer)
        assert len(batches) == 1 and torch.equal(batches[0]["input_ids"], encoded)


def test_calibration_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match=r"`calibration` has text, which needs `tokenizer`"):
        calibration_batches("text")
    with pytest.raises(ValueError, match=r"`calibration` is empty"):
        calibration_batches([])
    with pytest.raises(ValueError, match=r"an entry without tokens"):
        calibration_batches([[]])
    with pytest.raises(TypeError, match=r"`calibration` must be texts.*got int"):
        calibration_batches(3)


def test_random_tokens_repeat_with_the_seed():
    assert torch.equal(random_batch(50, 1)["input_ids"], random_batch(50, 1)["input_ids"])
    assert not torch.equal(random_batch(50, 1)["input_ids"], random_batch(50, 2)["input_ids"])
