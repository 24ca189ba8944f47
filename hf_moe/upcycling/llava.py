"""`upcycle_llava`: [`upcycle`] with the settings of MoE-LLaVA."""

from typing import Any

from transformers import PreTrainedModel

from .feed_forward import locate_feed_forwards
from .recipe import upcycle
from .report import UpcycleReport
from .sources import load_source


__all__ = ["upcycle_llava"]


def upcycle_llava(
    model: PreTrainedModel | str,
    num_experts: int = 4,
    top_k: int = 2,
    layers: str | list[int] = "sparse",
    *,
    residual: bool = False,
    **options: Any,
) -> tuple[PreTrainedModel, UpcycleReport]:
    """Turns a dense LLaVA into a MoE-LLaVA ([2401.15947](https://huggingface.co/papers/2401.15947)).

    [`upcycle`] of the language model with the paper's settings, see
    [`~hf_moe.models.moe_llava.configuration_moe_llava.paper_fields`]: each expert is a copy of the feed-forward it
    replaces, the router is new, everything else stays. At evaluation the result computes what the dense model did.

    Note: In training the paper drops what exceeds an expert's capacity, so the first training loss may differ from the
    dense model's; `expert_capacity_factor=None` drops nothing.

    Args:
        model (`PreTrainedModel` or `str`): `LlavaForConditionalGeneration`, or where to load it from, with Llama,
            Mistral (no sliding window), Qwen2, Qwen3, StableLM or Phi as language model.
        num_experts (`int`, defaults to 4): Experts per MoE layer, N.
        top_k (`int`, defaults to 2): Experts each token is sent to, K.
        layers (`str` or `list[int]`, defaults to `"sparse"`): The paper's `moe_mode`: `"sparse"` (layers 0, 2, 4,
            ...), `"first_half"`, `"second_half"`, `"dense"` (all), or a list; or whatever [`upcycle`] takes.
        residual (`bool`, defaults to `False`): Keep the dense feed-forward as a weighted branch beside the experts.
        **options: Further arguments of [`upcycle`], fields of the config among them.

    Returns:
        `tuple[MoeLlavaForConditionalGeneration, UpcycleReport]`

    Raises:
        ValueError: see [`upcycle`].

    Example:

    ```python
    >>> moe, report = upcycle_llava("llava-hf/llava-1.5-7b-hf")
    >>> print(report)
    ```
    """
    from hf_moe.models.moe_llava.configuration_moe_llava import PLACEMENTS, paper_fields

    model = load_source(model)
    layers = PLACEMENTS.get(layers, layers) if isinstance(layers, str) else layers
    chosen = [site.layer_idx for site in locate_feed_forwards(model, layers)]
    settings = paper_fields(max(chosen) + 1, moe_layers=chosen)
    for name in ("num_experts", "num_experts_per_tok", "moe_layers"):  # decided by the arguments
        settings.pop(name)
    if "router_type" in options or options.get("weights", "renormalise") != "renormalise":
        settings.pop("router_config")
    if residual:
        options = {"shared": "residual", **options}
    options = {"target": "moe_llava", **settings, **options}
    return upcycle(model, num_experts=num_experts, top_k=top_k, layers=layers, **options)
