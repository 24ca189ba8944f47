"""Puts slice layers where the chosen experts and their routers are."""

import difflib
from typing import Any, ClassVar

from torch import nn

from hf_moe.adapters.core import CellLayer, CellTuner
from hf_moe.views import MoeLayerView, moe_layers

from .config import ExpertSliceConfig
from .layer import BankLayer, RouterLayer, SliceLayer, bank_parameters, router_parameters


__all__ = ["ExpertSliceModel", "resolve_layers"]


class ExpertSliceModel(CellTuner):
    """Trains single experts of a Mixture-of-Experts model, of transformers or of hf_moe.

    Args:
        model (`nn.Module`): A model that [`~hf_moe.moe_layers`] accepts.
        config ([`ExpertSliceConfig`]): Which experts.
        adapter_name (`str`): Name of the adapter.

    Raises:
        ValueError: The model has no MoE layer; a layer or an expert of the config is not in it. It is as it was then.

    Example:
        ```python
        model = peft.get_peft_model(model, hf_moe.ExpertSliceConfig(layers={0: [3]}, task_type="CAUSAL_LM"))
        ...  # train
        model.merge_and_unload().save_pretrained("unlearned")  # loads without the plugin
        ```
    """

    prefix: str = SliceLayer.prefix
    tuner_layer_cls = SliceLayer
    target_module_mapping: ClassVar[dict[str, Any]] = {}

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config  # the targets follow from `layers`, see below

    def _prepare_model(self, peft_config: ExpertSliceConfig, model: nn.Module) -> None:
        """Finds the modules of the layers in the config, before anything is changed."""
        chosen = resolve_layers(model, peft_config.layers)
        paths = {id(module): path for path, module in model.named_modules()}
        targets = set()
        for view, _ in chosen:
            targets.add(f"{view.name}.experts")
            if peft_config.train_router and router_parameters(view.router):
                targets.add(paths[id(view.router)].removesuffix(".base_layer"))
        given = peft_config.target_modules
        if given is not None and set(given) != targets:  # a saved config has them
            raise ValueError(
                f"Target modules {given!r} not found: the targets of expert slices follow from `layers`. Leave "
                "`target_modules` out."
            )
        peft_config.layers = {view.name: experts for view, experts in chosen}
        peft_config.target_modules = sorted(targets)

    def make_layer(self, config: Any, target: nn.Module, key: str, parameter_name: str | None) -> CellLayer:
        """A layer around a bank or a router."""
        is_bank = key.removesuffix(".experts") in config.layers
        return BankLayer(target, None, key) if is_bank else RouterLayer(target, None, key)


def resolve_layers(model: nn.Module, layers: dict[str, list[int]]) -> list[tuple[MoeLayerView, list[int]]]:
    """The MoE layers a config means.

    Args:
        model (`nn.Module`): The model.
        layers (`dict[str, list[int]]`): Expert numbers by layer name, or by position as a number in a string.

    Returns:
        `list`: Of (view, expert numbers), in the order of the model.

    Raises:
        ValueError: There is no such layer or expert, or the experts are not stacked the usual way.
    """
    views = moe_layers(model)
    names = [view.name for view in views]
    chosen: dict[int, tuple[MoeLayerView, list[int]]] = {}
    for name, experts in layers.items():
        position = names.index(name) if name in names else int(name) if name.isdecimal() else len(views)
        if position >= len(views):
            raise ValueError(_unknown_layer(model, name, names))
        view = views[position]
        if position in chosen:
            raise ValueError(f"`layers` has the layer {view.name!r} twice, by name and by position.")
        _check_experts(view, experts)
        chosen[position] = (view, experts)
    return [chosen[position] for position in sorted(chosen)]


def _unknown_layer(model: nn.Module, name: str, names: list[str]) -> str:
    if name in {path for path, _ in model.named_modules()}:
        what = f"the module {name!r}, which has no routed experts"
    else:
        what = f"{name!r}, which the model does not have"
    near = difflib.get_close_matches(name, names, 3) or names[:3]
    return (
        f"`layers` has {what}. Its {len(names)} MoE layers are numbered from 0 to {len(names) - 1}; names look like "
        f"{', '.join(map(repr, near))}."
    )


def _check_experts(view: MoeLayerView, experts: list[int]) -> None:
    beyond = [expert for expert in experts if expert >= view.num_computing_experts]
    if beyond:
        raise ValueError(
            f"`layers[{view.name!r}]` has the experts {beyond}; this layer's routed experts with weights are 0 to "
            f"{view.num_computing_experts - 1}."
        )
    bank: Any = view.experts
    try:
        counts = {parameter.shape[0] for parameter in bank_parameters(bank).values()}
        floating = all(parameter.is_floating_point() for parameter in bank_parameters(bank).values())
    except AttributeError as error:
        raise ValueError(
            f"The experts of {view.name!r} ({type(bank).__name__}) are not stacked as transformers' experts contract "
            f"has them: {error}. Expert slices need `gate_up_proj` (or `up_proj`) and `down_proj`."
        ) from error
    if counts != {view.num_computing_experts}:
        raise ValueError(
            f"The experts of {view.name!r} are spread over processes: {sorted(counts)} of "
            f"{view.num_computing_experts} are here. Expert slices need all of them in one place."
        )
    if not floating:
        raise ValueError(f"The experts of {view.name!r} are quantised. Expert slices need weights to copy.")
