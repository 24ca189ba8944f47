"""The split layer: its partition, its experts, what trains, and what it merges into."""

import copy

import pytest
import torch
from torch import nn

from hf_moe.adapters.mosa.split import SplitLinear, partition


def linear(in_features=6, out_features=5, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(in_features, out_features, bias=bias)


def trained(seed=0, **kwargs):
    torch.manual_seed(seed)
    return SplitLinear(linear(**kwargs), 4, seed=1, from_zero=False, trained=True)


@pytest.mark.parametrize(
    "shape, sizes", [((768, 64), [12288] * 4), ((5, 7), [8, 9, 9, 9]), ((3, 3), [2, 2, 2, 3]), ((2, 3, 4), [6] * 4)]
)
def test_partition_covers_everything_once_with_the_stated_sizes(shape, sizes):
    assign = partition(shape, 4, seed=0)
    assert assign.shape == shape and assign.dtype == torch.uint8
    assert assign.flatten().bincount().tolist() == sizes


def test_partition_is_given_by_its_seed_and_looks_random():
    assert torch.equal(partition((40, 30), 4, 7), partition((40, 30), 4, 7))
    other = partition((40, 30), 4, 8)
    agree = (partition((40, 30), 4, 7) == other).float().mean()
    assert 0.2 < agree < 0.3
    assert (other.bool().any(0)).all() and (other.bool().any(1)).all()  # neither by rows nor by columns


def test_too_many_experts_are_refused():
    with pytest.raises(ValueError, match="`num_experts` must be between 1 and 6"):
        partition((2, 3), 7, 0)
    with pytest.raises(ValueError, match="between 1 and 256"):
        partition((20, 30), 257, 0)


def test_merging_by_hand():
    layer = SplitLinear(torch.zeros(2, 2), 2, seed=0)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[4.0, 8.0], [12.0, 16.0]]))
        layer.assign.copy_(torch.tensor([[0, 1], [1, 0]]))
    assert torch.equal(layer.expert(0)[0], torch.tensor([[4.0, 0.0], [0.0, 16.0]]))
    assert torch.equal(layer.expert(1)[0], torch.tensor([[0.0, 8.0], [12.0, 0.0]]))
    assert torch.equal(layer.eval().merged()[0], torch.tensor([[2.0, 4.0], [6.0, 8.0]]))
    layer.merge_scale = 2.0  # the union of the experts
    assert torch.equal(layer._merge()[0], layer.weight)


def test_merged_is_the_mean_of_the_experts():
    layer = trained().eval()
    experts = [layer.expert(i) for i in range(4)]
    torch.testing.assert_close(layer.merged()[0], torch.stack([w for w, _ in experts]).mean(0))
    torch.testing.assert_close(layer.merged()[1], torch.stack([b for _, b in experts]).mean(0))


def test_one_step_reaches_only_the_drawn_expert(monkeypatch):
    layer = trained().train()
    for index in range(4):
        monkeypatch.setattr(layer, "draw", lambda index=index: torch.tensor([index]))
        layer.zero_grad()
        layer(torch.rand(3, 6) + 0.1).sum().backward()
        assert torch.equal(layer.weight.grad != 0, layer.assign == index)
        assert layer.bias.grad.any(1).tolist() == [i == index for i in range(4)]


def test_one_tensor_equals_copies_with_masked_gradients():
    torch.manual_seed(0)
    start = linear()
    layer = SplitLinear(start, 4, seed=3, from_zero=False).train()
    copies = [copy.deepcopy(start) for _ in range(4)]
    ours = torch.optim.SGD(layer.parameters(), lr=0.1)
    draws = torch.Generator().manual_seed(5)
    for _ in range(50):
        x = torch.randn(8, 6, generator=draws)
        torch.manual_seed(int(x.sum() * 1e6))
        index = int(torch.randint(4, (1,)))
        torch.manual_seed(int(x.sum() * 1e6))
        ours.zero_grad()
        (layer(x) - 1).square().mean().backward()
        ours.step()
        copies[index].zero_grad()
        (copies[index](x) - 1).square().mean().backward()
        with torch.no_grad():
            for parameter, mask in zip(
                copies[index].parameters(), ((layer.assign == index).float(), torch.ones(5)), strict=True
            ):
                parameter -= 0.1 * mask * parameter.grad
    for index, other in enumerate(copies):
        weight, bias = layer.expert(index)
        torch.testing.assert_close(weight, other.weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(bias, other.bias, rtol=0, atol=1e-6)
        outside = layer.assign != index
        assert torch.equal(weight[outside], start.weight[outside])
        assert not torch.equal(weight, start.weight)


def test_draws_are_uniform_and_follow_torchs_seed():
    layer = trained()
    torch.manual_seed(0)
    draws = torch.cat([layer.draw() for _ in range(4000)])
    counts = draws.bincount(minlength=4)
    assert ((counts - 1000).square() / 1000).sum() < 11.34  # chi-square, three degrees of freedom, 1 %
    torch.manual_seed(0)
    assert torch.equal(torch.cat([layer.draw() for _ in range(10)]), draws[:10])


def test_training_uses_an_expert_and_evaluation_the_mean():
    layer, x = trained(), torch.randn(2, 6)
    experts = [nn.functional.linear(x, *layer.expert(i)) for i in range(4)]
    seen = set()
    for _ in range(40):
        result = layer.train()(x)
        seen |= {i for i, expert in enumerate(experts) if torch.equal(result, expert)}
    assert seen == {0, 1, 2, 3}
    torch.testing.assert_close(layer.eval()(x), torch.stack(experts).mean(0))


@torch.no_grad()
def test_kept_merge_is_forgotten_when_anything_is_edited():
    layer, x = trained().eval(), torch.randn(2, 6)
    first = layer(x)
    assert layer(x) is not first and layer.merged()[0] is layer.merged()[0]
    for edit in (
        lambda: layer.weight.mul_(2.0),
        lambda: layer.bias.add_(1.0),
        lambda: layer.initial.zero_(),
        lambda: layer.load_state_dict(trained(seed=9).state_dict()),
        lambda: setattr(layer, "weight", nn.Parameter(layer.weight * 3)),
        lambda: (layer.weight.data.mul_(5.0), layer.eval()),
        lambda: (layer.train().weight.data.mul_(0.5), layer.eval()),
        lambda: layer.double(),
    ):
        before = [t.clone() for t in layer.merged()]
        edit()
        weight, bias = layer.merged()
        assert torch.equal(weight, layer._merge()[0]) and torch.equal(bias, layer._merge()[1])
        changed = [
            t.dtype != old.dtype or not torch.equal(t, old) for t, old in zip((weight, bias), before, strict=True)
        ]
        assert any(changed)
        x = x.to(weight.dtype)
        assert torch.equal(layer(x), nn.functional.linear(x, weight, bias))


def test_gradients_in_evaluation_are_those_of_the_mean():
    layer = trained().eval()
    with torch.no_grad():
        layer.merged()
    layer(torch.rand(3, 6)).sum().backward()
    assert (layer.weight.grad != 0).all() and (layer.bias.grad == 0.25 * 3).all()


def test_copies_do_not_share_the_kept_merge():
    layer, x = trained().eval(), torch.randn(2, 6)
    with torch.no_grad():
        expected = layer(x)
        other = copy.deepcopy(layer)
        assert torch.equal(other(x), expected)
        other.weight.zero_()
        assert not torch.equal(other(x), expected)
        assert torch.equal(layer(x), expected)
        with torch.inference_mode():
            assert torch.equal(layer(x), expected)


def test_gradients_need_no_copy_of_a_start_at_zero():
    layer = SplitLinear(torch.zeros(3, 4), 4, seed=0)
    assert layer.initial is None and set(layer.state_dict()) == {"weight", "assign"}
    assert sum(t.numel() * t.element_size() for t in layer.state_dict().values()) == 12 * 4 + 12
