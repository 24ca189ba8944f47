"""Every experts class of the installed transformers, found by reading its model files: ours equals its own loop."""

import importlib
import re
from pathlib import Path

import pytest
import torch
import transformers
from common.expert_banks import assert_same


SIZE = {"hidden": 16, "intermediate": 32, "experts": 4}
MODELS = Path(transformers.__file__).parent / "models"
DECORATED = re.compile(r"^@use_experts_implementation\b[^\n]*\n(?:@[^\n]*\n)*class (\w+)", re.MULTILINE)


def decorated_classes():
    """`(module, class name)` of every decorated class; a modular file's classes are in its modeling file, too."""
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        for name in DECORATED.findall(file.read_text(encoding="utf-8")):
            yield f"transformers.models.{file.parent.name}.{file.stem}", name


CLASSES = list(decorated_classes())


def test_the_scan_finds_the_classes():
    assert len(CLASSES) >= 60
    assert ("transformers.models.mixtral.modeling_mixtral", "MixtralExperts") in CLASSES


class TinyConfig:
    """Answers every size with a small one, whatever the family calls it."""

    hidden_act = hidden_activation = moe_hidden_act = mlp_hidden_act = activation = hidden_activation_function = "silu"
    swiglu_limit = swiglu_limit_shared = 1.0
    swiglu_alpha = 1.7
    _experts_implementation = "eager"
    rms_norm_eps = post_norm_eps = layer_norm_eps = 1e-5
    dtype = torch.float32

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if "expert" in name and not any(part in name for part in ("size", "dim", "hidden", "intermediate")):
            return SIZE["experts"]
        if "limit" in name or "softcap" in name:
            return 1.0
        if "latent" in name:
            return None
        if "intermediate" in name or "ffn" in name:
            return SIZE["intermediate"]
        if any(part in name for part in ("hidden", "size", "dim", "d_model")):
            return SIZE["hidden"]
        raise AttributeError(name)


def build(module, name):
    experts = getattr(importlib.import_module(module), name)(TinyConfig())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return experts


@pytest.mark.parametrize(("module", "name"), CLASSES, ids=[name for _, name in CLASSES])
def test_ours_equals_eager_forward_and_backward(module, name):
    experts = build(module, name)
    generator = torch.Generator().manual_seed(1)
    width = experts.down_proj.shape[-1 if experts.is_transposed else 1]
    hidden = torch.randn(9, width, generator=generator)
    chosen = torch.rand(9, experts.down_proj.shape[0], generator=generator).topk(2, dim=-1)
    results = {}
    for path in ("eager", "hf_moe", "hf_moe_exact", "hf_moe_decode"):
        experts.config._experts_implementation = path
        experts.zero_grad(set_to_none=True)
        x, w = hidden.clone().requires_grad_(), chosen.values.clone().requires_grad_()
        output = experts(x, chosen.indices, w)
        output.backward(hidden)
        results[path] = {"output": output.detach(), "hidden": x.grad, "weights": w.grad}
        results[path] |= {name: parameter.grad for name, parameter in experts.named_parameters()}
        with torch.no_grad():
            torch.testing.assert_close(experts(x, chosen.indices, w), output, atol=2e-5, rtol=1e-4)
    for path in ("hf_moe", "hf_moe_exact", "hf_moe_decode"):
        assert_same(results[path], results["eager"], atol=2e-5, rtol=1e-4)
