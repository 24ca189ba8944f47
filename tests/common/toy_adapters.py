"""Three adapter types that exist only for tests of the shared core: an addition to a weight, a gated pair, a block."""

from dataclasses import dataclass, field

import torch
from torch import nn

from hf_moe.adapters.core import BlockLayer, Bottleneck, CellLayer, CellTuner, MoeAdapterConfig, ParameterLayer
from hf_moe.registration import register_adapter


class LowRank(nn.Module):
    def __init__(self, shape, rank, init_weights):
        super().__init__()
        *stack, out_features, in_features = shape
        self.a = nn.Parameter(torch.empty(*stack, rank, in_features))
        self.b = nn.Parameter(torch.empty(*stack, out_features, rank))
        nn.init.normal_(self.a, std=0.1)
        nn.init.zeros_(self.b) if init_weights else nn.init.normal_(self.b, std=0.1)

    def delta(self):
        return self.b @ self.a


@dataclass
class ToyLinearConfig(MoeAdapterConfig):
    type_name = "HFMOE_TOY_LINEAR"
    r: int = 4

    def validate(self):
        self.require("r", self.r >= 1, "at least 1")


class ToyLinearLayer(CellLayer):
    prefix = "hfmoe_toy_linear_"

    def build(self, adapter_name, config):
        return {"cell": LowRank(self.base_layer.weight.shape, config.r, config.init_weights)}

    def adapt(self, adapter_name, x, output):
        return output + x @ self.delta_weight(adapter_name).T

    def delta_weight(self, adapter_name):
        return self.cell("cell", adapter_name).delta()


class ParamWrapper(ParameterLayer, ToyLinearLayer):
    def build(self, adapter_name, config):
        return {"cell": LowRank(self.get_param().shape, config.r, config.init_weights)}

    adapt = ParameterLayer.adapt


class ToyLinearTuner(CellTuner):
    prefix = "hfmoe_toy_linear_"
    tuner_layer_cls = ToyLinearLayer
    target_module_mapping = {"llama": ["q_proj", "v_proj"], "mixtral": ["q_proj"]}

    def make_layer(self, config, target, key, parameter_name):
        if parameter_name is not None:
            return ParamWrapper(target, parameter_name, self.runtime, key)
        return super().make_layer(config, target, key, parameter_name)


@dataclass
class ToyGateConfig(MoeAdapterConfig):
    type_name = "HFMOE_TOY_GATE"
    stage: str = "both"
    domains: list[str] = field(default_factory=lambda: ["default", "cell"])

    def validate(self):
        self.require("stage", self.stage in ("both", "gate"), "'both' or 'gate'")

    def frozen_containers(self):
        return ("expert",) if self.stage == "gate" else ()


class ToyGateLayer(CellLayer):
    prefix = "hfmoe_toy_gate_"
    containers = ("expert", "gate")

    def build(self, adapter_name, config):
        d, o = self.base_layer.in_features, self.base_layer.out_features
        experts = nn.ModuleDict({n: Bottleneck(d, o, 4, init_weights=config.init_weights) for n in config.domains})
        return {"expert": experts, "gate": nn.Linear(d, len(config.domains))}

    def adapt(self, adapter_name, x, output):
        weights = self.cell("gate", adapter_name)(x).softmax(-1)
        experts = self.cell("expert", adapter_name).values()
        return output + sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(experts))


class ToyGateTuner(CellTuner):
    prefix = "hfmoe_toy_gate_"
    tuner_layer_cls = ToyGateLayer
    target_module_mapping = {"llama": ["down_proj"]}


@dataclass
class ToyBlockConfig(MoeAdapterConfig):
    type_name = "HFMOE_TOY_BLOCK"


class ToyBlockLayer(BlockLayer):
    """Adds a bottleneck scaled by a strength that is given with each call."""

    prefix = "hfmoe_toy_block_"

    def build(self, adapter_name, config):
        width = self.get_base_layer().hidden_size
        return {"cell": Bottleneck(width, width, 4, init_weights=config.init_weights)}

    def adapt(self, adapter_name, x, output):
        strength = torch.as_tensor(self.runtime.get("strength", 1.0), dtype=x.dtype, device=x.device)
        return output + strength.reshape(-1, *[1] * (x.ndim - 1)) * self.cell("cell", adapter_name)(x)


class ToyBlockTuner(CellTuner):
    prefix = "hfmoe_toy_block_"
    tuner_layer_cls = ToyBlockLayer
    target_module_mapping = {"llama": ["mlp"]}
    takes = ("strength",)


for _config, _tuner in (
    (ToyLinearConfig, ToyLinearTuner),
    (ToyGateConfig, ToyGateTuner),
    (ToyBlockConfig, ToyBlockTuner),
):
    register_adapter(_config, _tuner)
