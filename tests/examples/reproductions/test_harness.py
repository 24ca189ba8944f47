import math

import pytest
import torch
from common.examples import load_example


@pytest.fixture(scope="module")
def harness():
    return load_example("reproductions/harness")


@pytest.fixture(scope="module")
def summary():
    return load_example("reproductions/summary")


@pytest.fixture(scope="module")
def bench(harness):
    return harness.Bench(harness.PRESETS["tiny"], seed=0)


def reproduction(harness, **fields):
    arms = {"plain": None, "new": None}
    return harness.Reproduction("toy", ("2401.00001",), "New is better.", arms, "plain", **fields)


def runs_of(values):
    return [
        {
            "reproduction": "toy",
            "arm": arm,
            "seed": seed,
            "figures": {"bits_per_byte": value, "time": 2.0},
            "seconds": 1,
        }
        for arm, row in values.items()
        for seed, value in enumerate(row)
    ]


def test_the_half_width_is_that_of_students_t(summary):
    assert summary.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))
    assert summary.half_width([1.0]) == math.inf
    assert summary.half_width([1.0] * 40) == 0


@pytest.mark.parametrize(
    ("new", "lower_is_better", "expected"),
    [
        ([0.5, 1.5, 2.5], True, "better"),
        ([0.5, 1.5, 2.5], False, "worse"),
        ([1.5, 2.5, 3.5], True, "worse"),
        ([0.2, 2.9, 2.7], True, "no difference"),
    ],
)
def test_seeds_are_compared_in_pairs(harness, summary, new, lower_is_better, expected):
    toy = reproduction(harness, lower_is_better=lower_is_better)
    plain, other = summary.verdicts([toy], runs_of({"plain": [1.0, 2.0, 3.0], "new": new}))
    assert plain["verdict"] == "baseline" and plain["figures"]["bits_per_byte"][0] == 2.0
    assert other["verdict"] == expected
    assert other["difference"][0] == pytest.approx(sum(new) / 3 - 2)


def test_the_table_names_claim_arms_and_all_figures(harness, summary, tmp_path):
    toy = reproduction(harness)
    runs = runs_of({"plain": [1.0, 2.0], "new": [0.5, 1.5]})
    table = summary.summarise([toy], summary.verdicts([toy], runs))
    assert "New is better." in table and "2401.00001" in table
    assert "| new | 1.0000 ± 6.3530 | -0.5000 ± 0.0000 | better | 2.0000 ± 0.0000 | 1 |" in table
    summary.draw([toy], runs, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_a_theoretical_value_takes_the_place_of_the_comparison(harness, summary):
    rows = summary.verdicts([reproduction(harness, target=-0.5)], runs_of({"plain": [1.0], "new": [0.5]}))
    assert [row["verdict"] for row in rows] == ["theory -0.5"] * 2


def test_the_baseline_must_be_an_arm(harness):
    with pytest.raises(ValueError, match=r"`baseline` must be one of the arms \['a'\], got 'b'"):
        harness.Reproduction("toy", (), "", {"a": None}, "b")


def test_bits_per_byte_of_a_uniform_model_are_known(bench):
    model = bench.language_model(num_experts=4, num_experts_per_tok=2)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()  # tied: all logits are 0
    blocks = torch.cat(list(bench.held_out.values()))[:, 1:]
    num_bytes = bench.text.bytes_per_token[blocks].sum().item()
    assert bench.evaluate(model) == pytest.approx(blocks.numel() * math.log2(1024) / num_bytes, rel=1e-5)


def test_tokens_stand_for_the_bytes_of_the_text(bench):
    assert bench.text.bytes_per_token[0] == 0
    assert (bench.text.bytes_per_token[1:] >= 1).all()
    assert bench.text.bytes_per_token.max() > 3


def test_the_same_seed_gives_the_same_model_and_text(harness, bench):
    again = harness.Bench(bench.preset, seed=0)
    one, other = (b.language_model(num_experts=4, num_experts_per_tok=2) for b in (bench, again))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert torch.equal(bench.train_blocks, again.train_blocks)
    assert not torch.equal(bench.train_blocks, harness.Bench(bench.preset, seed=1).train_blocks)


def test_training_and_evaluation_text_are_apart(bench):
    held_out = {tuple(block.tolist()) for blocks in bench.held_out.values() for block in blocks}
    train = {tuple(block.tolist()) for block in bench.train_blocks}
    assert not held_out & train


def test_training_reduces_held_out_bits(bench):
    model = bench.language_model(num_experts=4, num_experts_per_tok=2)
    before = bench.evaluate(model)
    trainer = bench.train(model, steps=12)
    assert trainer.state.global_step == 12
    assert bench.evaluate(model) < before


def test_every_preset_scales_its_own_value(harness):
    assert [preset.scale(1, 2, 3) for preset in harness.PRESETS.values()] == [3, 1, 2]
