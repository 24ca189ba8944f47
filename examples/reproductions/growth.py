"""AquilaMoE's scale-up: a small trained model grown to twice its width and depth, against random initialisation.

Every arm trains the large model with the same steps, text and learning rate. The small model is trained on other text
of the same kind first; the arm "random, and the small one's compute" gets as many further steps as that training cost.
"""

from harness import Arm, Bench, Reproduction


def new_small_model(bench: Bench):
    """Half the width and half the depth; heads are as wide as the large one's."""
    preset = bench.preset
    return bench.dense_model(
        hidden_size=preset.hidden_size // 2,
        intermediate_size=preset.intermediate_size // 2,
        num_hidden_layers=preset.layers // 2,
        num_attention_heads=preset.heads // 2,
        num_key_value_heads=preset.heads // 2,
    )


def budget(bench: Bench) -> int:
    """Steps of the large model."""
    return 2 * bench.preset.steps // 3


def measured(bench: Bench, model, steps: int, **figures: float) -> dict[str, float]:
    """Held-out loss right after initialisation and after training."""
    start = bench.evaluate(model)
    bench.train(model, steps=steps)
    return {"bits_per_byte": bench.evaluate(model), "at_start": start, **figures}


def random(bench: Bench) -> dict[str, float]:
    return measured(bench, bench.dense_model(), budget(bench))


def random_with_more_steps(bench: Bench) -> dict[str, float]:
    """A step costs in proportion to the parameters: the small model's training buys this many steps of the large."""
    model = bench.dense_model()
    bought = bench.preset.steps * new_small_model(bench).num_parameters() / model.num_parameters()
    return measured(bench, model, budget(bench) + round(bought))


def grown(**options) -> Arm:
    """An arm that grows the small model with these options of `grow_model`."""

    def arm(bench: Bench) -> dict[str, float]:
        from hf_moe import grow_model

        preset, small = bench.preset, new_small_model(bench)
        bench.train(small, data=bench.train_blocks.flip(0))  # what the large model comes to last, if at all
        source = bench.evaluate(small)
        large, _ = grow_model(
            small,
            hidden_size=preset.hidden_size,
            intermediate_size=preset.intermediate_size,
            num_attention_heads=preset.heads,
            num_key_value_heads=preset.heads,
            num_hidden_layers=preset.layers,
            seed=bench.seed,
            check=False,
            **options,
        )
        return measured(bench, large, budget(bench), small_model=source)

    return arm


REPRODUCTION = Reproduction(
    name="growth",
    papers=("2408.06567", "2110.07143"),
    claim="A model grown from a small trained one starts from a far lower loss and stays ahead of random "
    "initialisation at the same number of steps; AKI-Pro starts higher than FPI and overtakes it.",
    arms={
        "random": random,
        "random, and the small one's compute": random_with_more_steps,
        "FPI": grown(method="fpi"),
        "FPI, uneven": grown(width="fpi_uneven"),
        "AKI-Pro": grown(method="aki_pro"),
    },
    baseline="random",
)
