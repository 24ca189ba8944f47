"""Several CLIPs that differ in their feed-forwards become one CLIP-MoE (Diversified Multiplet Upcycling), and back.

Shapes: N experts, D hidden, I intermediate, P positions.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import CLIPModel
from transformers.utils import logging


__all__ = ["extract_clip", "stretch_positions", "stretch_text_positions", "upcycle_clip"]

logger = logging.get_logger(__name__)

TOWERS = ("text_model", "vision_model")
#: Parameters of a dense feed-forward and of a bank of experts.
PARTS = {"fc1.weight": "up_proj", "fc1.bias": "up_proj_bias", "fc2.weight": "down_proj", "fc2.bias": "down_proj_bias"}
#: Fields a MoE tower's config does not take from the dense one.
OWN_FIELDS = ("architectures", "dtype", "model_type", "transformers_version", "_name_or_path")


def upcycle_clip(
    base: CLIPModel,
    experts: Sequence[CLIPModel] | None = None,
    *,
    num_experts: int | None = None,
    num_experts_per_tok: int = 2,
    vision_layers: str | list[int] = "all",
    text_layers: str | list[int] = "all",
    router_std: float = 0.02,
    seed: int = 0,
    **moe_fields: Any,
) -> Any:
    """Expert i of every MoE layer is the feed-forward of the i-th model; all else is that of `base`
    ([CLIP-MoE](https://huggingface.co/papers/2409.19291), Sec. 3.2). Weights of the chosen experts are renormalised,
    so that copies of one feed-forward are that feed-forward whatever the router says.

    Args:
        base (`CLIPModel`): The dense model; left as it is.
        experts (`Sequence[CLIPModel]`, *optional*): The models of the stages, `base` itself first as in the paper.
            They should differ from `base` in feed-forwards alone, as multistage contrastive learning leaves them; what
            else differs is not used, and said. By default `num_experts` copies of `base`.
        num_experts (`int`, *optional*): N, where `experts` is not given; 4 by default.
        num_experts_per_tok (`int`, defaults to 2): K.
        vision_layers, text_layers (`str` or `list[int]`, default `"all"`): MoE layers of the towers, as `moe_layers`
            of [`~hf_moe.MoeClipVisionConfig`]; `"none"` leaves a tower dense.
        router_std (`float`, defaults to 0.02): Standard deviation of the routers' first weights.
        seed (`int`, defaults to 0): Their seed.
        **moe_fields: Further fields of both towers' configs, such as `expert_dropout`.

    Returns:
        [`~hf_moe.MoeClipModel`]: In evaluation mode, with the dtype of `base`.

    Raises:
        ValueError: no expert, models of other sizes, or numbers that contradict each other.
        TypeError: a model that is no `CLIPModel`.

    Example:

    ```python
    >>> moe = upcycle_clip(clip, [clip, stage_1, stage_2, stage_3])
    ```
    """
    from hf_moe.models.clip import MoeClipConfig, MoeClipTextConfig, MoeClipVisionConfig
    from hf_moe.models.clip.modeling_clip import MoeClipModel

    models = [base] * (4 if num_experts is None else num_experts) if experts is None else list(experts)
    _check(base, models, num_experts)
    fields = {
        "num_experts": len(models),
        "num_experts_per_tok": num_experts_per_tok,
        "router_config": {"norm_topk_prob": True},
        "router_aux_loss_coef": 0.01,
        "initializer_range": router_std,
        **moe_fields,
    }
    towers = {}
    for name, cls, layers in (
        ("text_config", MoeClipTextConfig, text_layers),
        ("vision_config", MoeClipVisionConfig, vision_layers),
    ):
        dense = getattr(base.config, name).to_diff_dict()
        carried = {key: value for key, value in dense.items() if key not in OWN_FIELDS}
        towers[name] = cls(**{**carried, **fields, "moe_layers": layers})
    own = base.config.to_diff_dict()
    carried = {key: value for key, value in own.items() if key not in (*OWN_FIELDS, *towers)}
    config = MoeClipConfig(**carried, **towers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        moe = MoeClipModel(config).to(base.dtype)
    state = {name: tensor for name, tensor in base.state_dict().items()}
    states = [model.state_dict() for model in models]
    for path in (name for name, _ in moe.moe_blocks()):
        for dense_name, bank_name in PARTS.items():
            state.pop(f"{path}.{dense_name}")
            state[f"{path}.experts.{bank_name}"] = torch.stack([other[f"{path}.{dense_name}"] for other in states])
    missing, unexpected = moe.load_state_dict(state, strict=False)
    wrong = [*unexpected, *(name for name in missing if ".mlp.gate." not in name and "load_balancer" not in name)]
    if wrong:
        raise ValueError(f"`base` does not have the layout of a CLIPModel: {wrong[:3]}.")
    return moe.eval()


def extract_clip(moe: Any, expert: int = 0) -> CLIPModel:
    """The dense CLIP whose feed-forwards are those of one expert: with expert 0, what was upcycled, bit for bit.

    Args:
        moe ([`~hf_moe.MoeClipModel`]): The Mixture-of-Experts.
        expert (`int`, defaults to 0): Which one.

    Raises:
        ValueError: there is no such expert.

    Example:

    ```python
    >>> clip = extract_clip(moe)
    ```
    """
    from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

    fewest = min(moe.config.experts_per_layer)
    if not 0 <= expert < fewest:
        raise ValueError(f"`expert` must be from 0 to {fewest - 1}, got {expert}.")
    towers = {}
    for name, cls in (("text_config", CLIPTextConfig), ("vision_config", CLIPVisionConfig)):
        known = cls().to_dict().keys() - set(OWN_FIELDS)
        towers[name] = cls(**{k: v for k, v in getattr(moe.config, name).to_dict().items() if k in known})
    known = CLIPConfig().to_dict().keys() - {*OWN_FIELDS, *towers}
    config = CLIPConfig(**{k: v for k, v in moe.config.to_dict().items() if k in known}, **towers)
    dense = CLIPModel(config).to(moe.dtype)
    state = {name: t for name, t in moe.state_dict().items() if "load_balancer" not in name}
    for path in (name for name, _ in moe.moe_blocks()):
        bank = {name: state[f"{path}.experts.{bank_name}"][expert] for name, bank_name in PARTS.items()}
        state = {name: t for name, t in state.items() if not name.startswith(f"{path}.")}
        state |= {f"{path}.{name}": tensor for name, tensor in bank.items()}
    dense.load_state_dict(state)
    return dense.eval()


def stretch_positions(table: torch.Tensor, keep: int = 20, factor: int = 4) -> torch.Tensor:
    """A table of positions for longer texts: the first `keep` rows as they are, between the others `factor` - 1 new
    ones on the straight line, and after the last one the line goes on (Long-CLIP, 2403.15378, as CLIP-MoE uses it).

    Args:
        table (`torch.Tensor` of shape `(P, D)`): Positions.
        keep (`int`, defaults to 20): Rows that stay.
        factor (`int`, defaults to 4): How many take the place of each other row.

    Returns:
        `torch.Tensor` of shape `(keep + factor * (P - keep), D)`: 248 rows for CLIP's 77.

    Raises:
        ValueError: `keep` or `factor` out of range.
    """
    rows = table.shape[0]
    if not 0 <= keep <= rows - 2:
        raise ValueError(f"`keep` must be from 0 to {rows - 2}, got {keep}.")
    if factor < 1:
        raise ValueError(f"`factor` must be at least 1, got {factor}.")
    rest = table[keep:].float()
    step = torch.cat([rest.diff(dim=0), (rest[-1] - rest[-2])[None]])  # (P - keep, D)
    share = torch.arange(factor, device=table.device) / factor
    stretched = rest[:, None] + share[None, :, None] * step[:, None]  # (P - keep, factor, D)
    return torch.cat([table[:keep], stretched.flatten(0, 1).to(table.dtype)])


def stretch_text_positions(model: CLIPModel, keep: int = 20, factor: int = 4) -> CLIPModel:
    """A copy of a CLIP that reads longer captions; captions of at most `keep` tokens have the embedding they had.

    Args:
        model (`CLIPModel` or [`~hf_moe.MoeClipModel`]): Left as it is.
        keep, factor (`int`): As in [`stretch_positions`].

    Example:

    ```python
    >>> long = stretch_text_positions(clip)
    >>> long.config.text_config.max_position_embeddings
    248
    ```
    """
    model = copy.deepcopy(model)
    embeddings: Any = model.text_model.embeddings
    old = embeddings.position_embedding.weight
    table = stretch_positions(old.detach(), keep, factor)
    embeddings.position_embedding = nn.Embedding(*table.shape, _weight=table).to(old.device)
    embeddings.position_ids = torch.arange(len(table), device=old.device)[None]
    model.config.text_config.max_position_embeddings = model.text_model.config.max_position_embeddings = len(table)
    return model


def _check(base: Any, models: list[Any], num_experts: int | None) -> None:
    for model in (base, *models):
        if not isinstance(model, CLIPModel):
            raise TypeError(f"`experts` and `base` must be CLIPModel, got {type(model).__name__}.")
    if not models or (num_experts is not None and len(models) != num_experts):
        raise ValueError(f"`num_experts={num_experts}`, but there are {len(models)} models in `experts`.")
    shapes = {name: tensor.shape for name, tensor in base.state_dict().items()}
    for number, model in enumerate(models):
        if model is base:
            continue
        state, others = model.state_dict(), []
        for name, tensor in base.state_dict().items():
            if name not in state or state[name].shape != shapes[name]:
                raise ValueError(f"`experts[{number}]` has another size than `base`: {name}.")
            if ".mlp." not in name and not torch.equal(state[name].to(tensor), tensor):
                others.append(name)
        if others:
            logger.warning(
                f"`experts[{number}]` differs from `base` in more than feed-forwards ({len(others)} tensors, such as "
                f"{others[0]!r}), and only its feed-forwards are used. Train the experts with everything else frozen."
            )
