"""One line per adapter type (and per variant worth it) for the battery in `tests/adapters/test_battery.py`."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from hf_moe import LocalExpertConfig
from hf_moe.adapters import AgdConfig, MixdaConfig, MosaConfig, PillConfig
from hf_moe.adapters.agd import agd_guidance

from .tiny_denoisers import PlainDenoiser, latents
from .tiny_families import tiny_model
from .toy_adapters import ToyBlockConfig, ToyGateConfig, ToyLinearConfig


__all__ = ["CASES", "AdapterCase", "pixel_inputs", "tiny_llama", "tiny_vit", "token_inputs"]


def tiny_llama(**settings: Any) -> LlamaForCausalLM:
    """A Llama of two layers with random weights, always the same ones."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    } | settings
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def token_inputs() -> dict[str, torch.Tensor]:
    """Two rows of tokens, which are their own labels."""
    ids = torch.tensor([[5, 6, 7, 8, 5, 6], [9, 3, 2, 1, 9, 3]])
    return {"input_ids": ids, "labels": ids}


def one_expert(**fields: Any) -> Any:
    """An expert slice on one expert of the last two layers."""
    from hf_moe.adapters.expert_slice import ExpertSliceConfig

    return ExpertSliceConfig(**{"layers": {2: [1], 3: [0, 5]}, **fields})


def one_expert_llama() -> Any:
    """Without router losses, with which the model refuses reentrant checkpointing."""
    return tiny_model("moe_llama", router_aux_loss_coef=0.0)


def tiny_bert() -> BertForSequenceClassification:
    """A BERT of two layers with a head for three classes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=3, **sizes)).eval()


def labelled_inputs() -> dict[str, torch.Tensor]:
    """Two rows of tokens, the second padded, with a class each."""
    ids = torch.tensor([[5, 6, 7, 8, 5, 6], [9, 3, 2, 1, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([0, 2])}


def tiny_vit(**settings: Any) -> ViTForImageClassification:
    """A vision transformer of two layers for grey pictures of 16 x 16, with a head for three classes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    picture = {"image_size": 16, "patch_size": 4, "num_channels": 1, "num_labels": 3}
    return ViTForImageClassification(ViTConfig(**{**sizes, **picture, **settings})).eval()


def pixel_inputs() -> dict[str, torch.Tensor]:
    """Two pictures with a class each."""
    pixels = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 2])}


def stacked_mosa(**fields: Any) -> Any:
    """MoSA in LoRA form on the stacked experts of a model."""
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    chosen = {} if fields.get("target_modules") else {"target_modules": [], "target_parameters": targets}
    return MosaConfig(**{"style": "lora", "r": 2, **chosen, **fields})


def denoiser_inputs() -> dict[str, torch.Tensor]:
    """Two noisy samples at different timesteps and of different classes."""
    return {"x": latents(2, (4, 6)), "t": torch.tensor([3, 700]), "c": torch.tensor([0, 4])}


def plain_agd(**fields: Any) -> Any:
    """AGD on a denoiser that is no model of a library."""
    settings = {"target_modules": ["attn"], "architecture": "cross_attention", "hidden_size": 8, "num_heads": 2}
    settings |= {"condition_on": ("scale", "timestep", "class"), "condition_modules": {"class": "label"}}
    return AgdConfig(**(settings | fields))


def guided(model: Any) -> AbstractContextManager:
    """Sets the guidance scale of AGD adapters."""
    return agd_guidance(model, 3.0)


@dataclass(frozen=True)
class AdapterCase:
    """What the battery needs to know of an adapter type.

    Args:
        name: Its part of the test's id.
        config: Makes the config; takes fields by keyword.
        model: Makes the base model, the same weights each time.
        inputs: Makes a batch of two rows, with labels where the model gives a loss.
        starts_as_base: Whether a fresh adapter leaves the output bit for bit as it is.
        mergeable: Whether it can be merged into the base's weights.
        generates: Whether the model is a causal language model whose cached and uncached generation must agree.
        mixed: Whether rows of a batch may have different adapters.
        stages: Values of the config's `stage` that freeze some containers.
        within: Context in which the model is called, such as one that sets a condition.
    """

    name: str
    config: Callable[..., Any]
    model: Callable[[], Any] = tiny_llama
    inputs: Callable[[], dict[str, Any]] = token_inputs
    starts_as_base: bool = True
    mergeable: bool = False
    generates: bool = True
    mixed: bool = True
    stages: tuple[str, ...] = ()
    within: Callable[[Any], AbstractContextManager] = lambda model: nullcontext()

    def output(self, model: Any, **kwargs: Any) -> torch.Tensor:
        """The adapted model's logits (or first output), without gradients and labels."""
        with self.within(model):
            return self.base_output(model, **kwargs)

    def base_output(self, model: Any, **kwargs: Any) -> torch.Tensor:
        """The same of a model without adapters, which takes no conditions."""
        inputs = {name: value for name, value in self.inputs().items() if name != "labels"}
        with torch.no_grad():
            result = model(**inputs, **kwargs)
        if isinstance(result, torch.Tensor):
            return result
        return result.logits if hasattr(result, "logits") else result[0]

    def loss(self, model: Any) -> torch.Tensor:
        """The model's loss, or the mean square of its output."""
        with self.within(model):
            result = model(**self.inputs())
        if getattr(result, "loss", None) is not None:
            return result.loss
        return (result if isinstance(result, torch.Tensor) else result[0]).square().mean()


def token_inputs_with_image() -> dict[str, torch.Tensor]:
    """Two rows in which 60 stands for image tokens."""
    ids = torch.tensor([[5, 60, 60, 8, 5, 6], [9, 3, 60, 1, 9, 3]])
    return {"input_ids": ids, "labels": ids.masked_fill(ids == 60, -100)}


CASES = [
    AdapterCase("toy_linear", ToyLinearConfig, mergeable=True),
    AdapterCase("toy_gate", ToyGateConfig, stages=("gate",)),
    AdapterCase("toy_block", ToyBlockConfig),
    AdapterCase("agd", partial(AgdConfig, hidden_size=8), within=guided),
    AdapterCase(
        "agd_denoiser",
        plain_agd,
        model=PlainDenoiser,
        inputs=denoiser_inputs,
        generates=False,
        within=guided,
    ),
    AdapterCase(
        "local_expert",
        partial(LocalExpertConfig, mix="soft", gate_feature_module="bert.encoder.layer.0"),
        model=tiny_bert,
        inputs=labelled_inputs,
        generates=False,
        stages=("expert", "gate"),
    ),
    AdapterCase("expert_slice", one_expert, model=one_expert_llama, mergeable=True, mixed=False),
    # in bfloat16 only to rounding: Mixtral adds its experts up in float32, before the slice is added
    AdapterCase(
        "expert_slice_mixtral",
        one_expert,
        model=lambda: tiny_model("mixtral"),
        starts_as_base=False,
        mergeable=True,
        mixed=False,
    ),
    AdapterCase("mixda", MixdaConfig, starts_as_base=False, stages=("task",)),
    AdapterCase(
        "mixda_residual",
        partial(
            MixdaConfig,
            domains=["a", "default"],
            mix_form="residual",
            gate_pooling="mean",
            gate_hidden=[8],
            gate_activation="sigmoid",
            gate_dropout=0.1,
            domain_layers=[0, 1],
            task_reduction=4,
            reduction=8,
        ),
        model=tiny_bert,
        inputs=labelled_inputs,
        generates=False,
        stages=("task",),
    ),
    AdapterCase("pill", partial(PillConfig, r=4, modality_token_ids={"image": 60}), stages=("align",)),
    # image tokens are not the base's: closed gates take their values away
    AdapterCase(
        "pill_image",
        partial(PillConfig, r=4, modality_token_ids={"image": 60}),
        inputs=token_inputs_with_image,
        starts_as_base=False,
        stages=("align",),
    ),
    AdapterCase("mosa", partial(MosaConfig, r=4, dropout=0.0)),
    AdapterCase(
        "mosa_residual",
        partial(MosaConfig, r=4, share="none"),
        model=tiny_bert,
        inputs=labelled_inputs,
        generates=False,
    ),
    AdapterCase("mosa_lora", partial(MosaConfig, style="lora", r=4), mergeable=True),
    AdapterCase(
        "mosa_stacked",
        stacked_mosa,
        model=lambda: tiny_model("mixtral"),
        mergeable=True,
        mixed=False,
    ),
]
