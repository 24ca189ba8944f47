import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[2] / "examples" / "agd.py"
    spec = importlib.util.spec_from_file_location("agd_example", path)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.modules["agd_example"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    del sys.modules["agd_example"]
    sys.modules.pop("fashion_mnist", None)


def stripes(example, number, seed):
    """Pictures whose class is the row of a bright stripe."""
    random = np.random.default_rng(seed)
    labels = np.arange(number) % 10
    images = random.integers(0, 40, (number, 28, 28))
    for image, label in zip(images, labels, strict=True):
        image[2 * label + 3 : 2 * label + 7] = 220
    return images.astype(np.uint8), labels.astype(np.uint8)


def test_the_story_runs_at_its_smallest(example, tmp_path):
    settings = example.Settings(
        width=16, layers=2, base_steps=6, batch_size=8, classifier_steps=6, sampling_steps=3, trajectories=10,
        adapter_width=4, adapter_steps=3, scale_range=(1.0, 4.0), scales=(2.0, 4.0), samples=20, rounds=1,
        round_samples=4,
    )  # fmt: skip
    data = example.Pictures(*stripes(example, 60, 0), *stripes(example, 40, 1))
    runs = example.main(["--seeds", "0", "1", "--output", str(tmp_path)], data, settings)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(runs) == len(results["runs"]) == 2
    assert {(row["method"], row["scale"]) for row in runs[0]["quality"]} == {
        ("cfg", 2.0), ("cfg", 4.0), ("agd", 2.0), ("agd", 4.0), ("none", 2.0),
    }  # fmt: skip
    assert all(np.isfinite(row["frechet"]) and 0 <= row["accuracy"] <= 1 for run in runs for row in run["quality"])
    assert (tmp_path / "agd.png").stat().st_size > 10_000
    assert (tmp_path / "results.md").read_text().count("\n| ") == 5
    state = load_file(tmp_path / "adapter-seed1" / "adapter_model.safetensors")
    assert sum(value.numel() for key, value in state.items() if "features." not in key) == runs[1]["trained"]
    assert runs[0]["time"]["wall_ratio"]["cfg"] == 1.0


def test_the_presets_train_at_most_a_twentieth_of_the_base(example):
    from diffusers import DiTTransformer2DModel
    from peft import get_peft_model

    for settings in example.PRESETS.values():
        with torch.device("meta"):
            model = DiTTransformer2DModel(
                num_attention_heads=4, attention_head_dim=settings.width // 4, in_channels=1, sample_size=14,
                num_layers=settings.layers, num_embeds_ada_norm=10, norm_num_groups=1,
            )  # fmt: skip
            config = example.AgdConfig(hidden_size=settings.adapter_width)
            trained, total = get_peft_model(model, config, autocast_adapter_dtype=False).get_nb_trainable_parameters()
        assert trained <= 0.05 * (total - trained)


def test_the_frechet_distance_of_two_gaussians(example):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4000, 3, generator=generator)
    assert example.frechet(a, a) == pytest.approx(0.0, abs=1e-4)
    assert example.frechet(a, a + 2.0) == pytest.approx(12.0, abs=1e-4)
    assert example.frechet(a, 3.0 * a) == pytest.approx(
        4.0 * a.var(0).sum().item() + 4 * a.mean(0).square().sum().item(), rel=1e-3
    )
