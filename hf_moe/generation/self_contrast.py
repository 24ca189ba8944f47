"""Self-contrast decoding: one MoE model run twice per token, with its own routing and with a worse one."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.utils import logging

from hf_moe.views import moe_layers

from .contrast import contrast_logits
from .fused import FusedStreams, why_not_fused
from .loop import decode
from .refusals import arguments_kept_back, check_cache, check_mode
from .streams import SeparateStreams
from .switch import WeakSwitch
from .weak import WeakRouting, parse_weak


__all__ = ["MODES", "SelfContrast"]

logger = logging.get_logger(__name__)

MODES = ("auto", "fused", "separate")


@dataclass(frozen=True, kw_only=True)
class SelfContrast:
    r"""Self-contrast decoding (SCMoE) of any Mixture-of-Experts language model, without training.

    Paper: https://huggingface.co/papers/2405.14507. Per token the model runs twice, with its own routing (strong) and
    with `weak` routing, each stream over its own cache, prompt included; see [`contrast_logits`] for how the two
    become scores. The paper reports gains where an answer is reasoned out in text (GSM8K,
    StrategyQA, MBPP, HumanEval) and none where it is not (MMLU).

    Pass an instance as `custom_generate`. Greedy decoding and sampling, logits processors, stopping criteria,
    left-padded batches, every cache, PEFT-wrapped and quantised models work as without it. Beams and assistants are
    refused. `generate` keeps `streamer`, `stop_strings` and `synced_gpus` from callables: give them to
    [`scmoe_generate`], or the first and the last to the constructor.

    The second cache takes as much memory as the first (a prompt of S tokens costs 2S positions), in either mode, and
    the prompt is read twice. `return_dict_in_generate=True` returns [`SelfContrastOutput`] with the bytes.

    Args:
        beta (`float`, *optional*, defaults to 0.5): Strength of the contrast. The paper searched 0.1 .. 0.9; its best
            were 0.5 for GSM8K, StrategyQA and HumanEval, 0.1 for MBPP.
        alpha (`float`, *optional*, defaults to 0.1): Share of the best token's probability below which a token is out
            of the question; from 0 to 1.
        weak (`str`, *optional*, defaults to `"rank:2"`): Routing of the weak stream: `"rank:k"` the k-th best expert
            alone, counted from 1; `"top:m"` the m best; `"random:r"` r random ones per token and layer.
        weak_weights (`str`, *optional*, defaults to `"native"`): `"native"`: mixing weights as the family computes
            them, so a family that does not renormalise keeps the raw probability; `"renormalised"`: sum 1.
        strong_temperature (`float`, *optional*, defaults to 1.0): Divides the strong logits before the contrast.
        weak_temperature (`float`, *optional*, defaults to 1.0): Divides the weak logits before the contrast.
        mode (`str`, *optional*, defaults to `"auto"`): `"fused"`: both streams are one batch of twice the rows, which
            reads the dense weights once per token; `"separate"`: two forward passes; `"auto"`: fused where possible.
        streamer ([`~transformers.generation.BaseStreamer`], *optional*): Gets the prompt, every token and the end.
        synced_gpus (`bool`, *optional*): Go on until every process is finished. By default decided as `generate` does.
        generator (`torch.Generator`, *optional*): Source of random experts, on the model's device.
        seed (`int`, *optional*): Instead of `generator`: every call draws the same random experts.

    Raises:
        TypeError, ValueError: An argument is not what it has to be. A call raises ValueError before anything runs if
            `model` has no MoE layer or too few experts, or if beams or an assistant are asked for.

    Note: The released code counts ranks from 0 and bans the end-of-sequence token; the paper does neither, nor is it
    done here.

    Example:
        ```python
        model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B")
        model.generate(**inputs, max_new_tokens=256, custom_generate=hf_moe.SelfContrast(beta=0.5, weak="rank:2"))
        ```
    """

    beta: float = 0.5
    alpha: float = 0.1
    weak: str = "rank:2"
    weak_weights: str = "native"
    strong_temperature: float = 1.0
    weak_temperature: float = 1.0
    mode: str = "auto"
    streamer: Any = None
    synced_gpus: bool | None = None
    generator: torch.Generator | None = None
    seed: int | None = None

    def __post_init__(self):
        routing = self.weak_routing
        for name, low, high in (("beta", 0, math.inf), ("alpha", 0, 1)):
            if not low <= _number(name, getattr(self, name)) <= high:
                allowed = "at least 0" if high == math.inf else f"between {low} and {high}"
                raise ValueError(f"`{name}` must be {allowed}, got {getattr(self, name)}.")
        for name in ("strong_temperature", "weak_temperature"):
            if _number(name, getattr(self, name)) <= 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}.")
        if self.mode not in MODES:
            raise ValueError(f"`mode` must be one of {list(MODES)}, got {self.mode!r}.")
        if self.streamer is not None and not all(hasattr(self.streamer, method) for method in ("put", "end")):
            raise TypeError(f"`streamer` must have methods `put` and `end`, got {type(self.streamer).__name__}.")
        if not (self.synced_gpus is None or isinstance(self.synced_gpus, bool)):
            raise TypeError(f"`synced_gpus` must be True, False or None, got {self.synced_gpus!r}.")
        if not (self.generator is None or isinstance(self.generator, torch.Generator)):
            raise TypeError(f"`generator` must be a torch.Generator, got {type(self.generator).__name__}.")
        if not (self.seed is None or (isinstance(self.seed, int) and not isinstance(self.seed, bool))):
            raise TypeError(f"`seed` must be an integer, got {self.seed!r}.")
        if self.seed is not None and self.generator is not None:
            raise ValueError("`seed` and `generator` exclude each other: pass one of them.")
        if routing.kind != "random" and not (self.seed is None and self.generator is None):
            raise ValueError(f'`seed` and `generator` are for `weak="random:r"`, got `weak={self.weak!r}`.')

    @property
    def weak_routing(self) -> WeakRouting:
        """What `weak` and `weak_weights` say."""
        return parse_weak(self.weak, self.weak_weights)

    @torch.no_grad()
    def __call__(
        self, model: Any, input_ids: torch.Tensor, logits_processor: Any, stopping_criteria: Any,
        generation_config: Any, **model_kwargs: Any,
    ) -> Any:  # fmt: skip
        """What `generate` calls once it has prepared everything.

        Args:
            model ([`~transformers.PreTrainedModel`]): The model.
            input_ids (`torch.LongTensor` of shape `(B, S)`): The prompt, already expanded to all return sequences.
            logits_processor (`LogitsProcessorList`): They see the contrasted scores.
            stopping_criteria (`StoppingCriteriaList`): When to stop.
            generation_config ([`~transformers.GenerationConfig`]): Prepared by `generate`.
            **model_kwargs: Arguments of the forward pass.

        Returns:
            `torch.LongTensor` of shape `(B, S + new)`, or [`SelfContrastOutput`] with `return_dict_in_generate=True`.

        Raises:
            ValueError: see [`SelfContrast`].
        """
        layers = moe_layers(model)
        routing = self.weak_routing
        routing.check(layers)
        check_mode(model, generation_config)
        check_cache(generation_config, model_kwargs, input_ids)
        kept_back = arguments_kept_back()
        synced_gpus = self._synced(model)
        self._check_kept_back(kept_back, synced_gpus)
        mode = self._choose_mode(why_not_fused(model, generation_config, model_kwargs, input_ids, layers))
        make_streams = FusedStreams if mode == "fused" else SeparateStreams
        with WeakSwitch(model, layers, routing, mode == "fused", self._generator(model)) as weak:
            streams = make_streams(model, generation_config, model_kwargs, input_ids, weak)
            if self.streamer is not None and kept_back.get("streamer") is None:  # else `generate` has put the prompt
                self.streamer.put(input_ids.cpu())
            output = decode(
                model, input_ids, streams, self.contrast, logits_processor, stopping_criteria, generation_config,
                synced_gpus, self.streamer,
            )  # fmt: skip
        logger.info(
            f"Self-contrast decoding ({mode}): the weak stream's cache took {streams.weak_cache_bytes()} bytes."
        )
        return output

    def contrast(self, strong_logits: torch.Tensor, weak_logits: torch.Tensor) -> torch.Tensor:
        """[`contrast_logits`] with this object's settings.

        Args:
            strong_logits (`torch.Tensor` of shape `(B, V)`): z_s.
            weak_logits (`torch.Tensor` of shape `(B, V)`): z_w.

        Returns:
            `torch.Tensor` of shape `(B, V)`.
        """
        strong, weak = strong_logits / self.strong_temperature, weak_logits / self.weak_temperature
        return contrast_logits(strong, weak, self.beta, self.alpha)

    def _check_kept_back(self, kept_back: dict[str, Any], synced_gpus: bool) -> None:
        if kept_back.get("assistant_model") is not None:
            raise ValueError("Self-contrast decoding cannot run with an assistant. Remove `assistant_model`.")
        streamer = kept_back.get("streamer")
        lost = "streamer" if streamer is not None and streamer is not self.streamer else None
        lost = "synced_gpus" if kept_back.get("synced_gpus") and not synced_gpus else lost
        if lost is not None:
            raise ValueError(
                f"`generate` does not hand `{lost}` to a `custom_generate` callable. Pass it to the callable, "
                f"`SelfContrast(..., {lost}={lost})`, or call `hf_moe.scmoe_generate(model, ..., {lost}={lost})`."
            )

    def _choose_mode(self, obstacle: str | None) -> str:
        if self.mode == "fused" and obstacle is not None:
            raise ValueError(f'`mode="fused"` is not possible here: {obstacle}. Use `mode="separate"` or "auto".')
        return "separate" if self.mode == "separate" or obstacle is not None else "fused"

    def _generator(self, model: Any) -> torch.Generator | None:
        if self.seed is None:
            return self.generator
        return torch.Generator(device=model.device).manual_seed(self.seed)

    def _synced(self, model: Any) -> bool:
        if self.synced_gpus is not None:
            return self.synced_gpus
        world = torch.distributed.get_world_size() if _distributed() else 1
        return world > 1 and (is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model))


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value}.")
    return value


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
