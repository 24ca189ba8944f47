"""MixDA in a model: which modules, and domains that come and go."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from hf_moe.adapters.core import CellTuner

from .config import MixdaConfig, check_domains, layer_number
from .layer import MixdaLayer
from .sources import DomainSources


__all__ = ["MixdaModel"]

# The last linear map of the feed-forward network. A name that an attention's output shares is in `_EXCLUDED`.
_TARGETS = {
    "bert": ["output.dense"],
    "bloom": ["dense_4h_to_h"],
    "camembert": ["output.dense"],
    "deberta-v2": ["output.dense"],
    "distilbert": ["ffn.lin2"],
    "electra": ["output.dense"],
    "gemma": ["down_proj"],
    "gemma2": ["down_proj"],
    "gpt2": ["mlp.c_proj"],
    "gpt_neox": ["dense_4h_to_h"],
    "llama": ["down_proj"],
    "mistral": ["down_proj"],
    "modernbert": ["mlp.Wo"],
    "opt": ["fc2"],
    "phi": ["fc2"],
    "phi3": ["down_proj"],
    "qwen2": ["down_proj"],
    "qwen3": ["down_proj"],
    "roberta": ["output.dense"],
    "t5": ["wo"],
    "vit": ["mlp.fc2"],
    "xlm-roberta": ["output.dense"],
}
_EXCLUDED = {name: ["attention.output.dense"] for name, targets in _TARGETS.items() if targets == ["output.dense"]}
# The paper's layers, 7 and 11 of 24, counted from 0.
_DEPTHS = (7, 11)
_PAPER_LAYERS = 24


class MixdaModel(CellTuner):
    """Domain adapters beside the feed-forward networks of chosen layers (https://huggingface.co/papers/2306.05406).

    Not mergeable: the gate depends on the input.

    Example:
        ```python
        model = peft.get_peft_model(model, MixdaConfig.from_domains({"biology": "out/biology"}))
        model.add_domain("law", "out/law")  # then train the gate again
        model.set_domains(["law"])
        ```
    """

    prefix = "hfmoe_mixda_"
    tuner_layer_cls = MixdaLayer
    target_module_mapping = _TARGETS
    reads = ("attention_mask", "decoder_attention_mask")

    def make_layer(self, config: Any, target: nn.Module, key: str, parameter_name: str | None) -> MixdaLayer:
        """See [`CellTuner.make_layer`]. Only a gate that averages needs the attention mask."""
        if parameter_name is not None:
            return super().make_layer(config, target, key, parameter_name)  # pyright: ignore[reportReturnType]
        return MixdaLayer(target, name=key)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, which calls it. Weights from files need memory to be copied to.

        Args:
            model (`nn.Module`): The base model.
            adapter_name (`str`): The adapter.
            *args, **kwargs: As PEFT says.

        Raises:
            ValueError: The weights come from files and were to be made without memory.
        """
        config: Any = self.peft_config[adapter_name]
        # PEFT either hands it on, or has already seen to it that all new weights are on the meta device.
        empty = kwargs.get("low_cpu_mem_usage") or nn.Linear(1, 1).weight.is_meta
        if config._sources is not None and empty:
            raise ValueError(
                "`low_cpu_mem_usage=True` makes weights without memory, so the domain adapters cannot be copied into "
                "them. Leave it out with `MixdaConfig.from_domains`."
            )
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        *args,
        **kwargs,
    ) -> None:
        super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, *args, **kwargs)
        layer: Any = getattr(parent, target_name)
        if peft_config.gate_pooling == "mean":
            layer.runtime = self.runtime
        sources = peft_config._sources
        if sources is not None and layer.cell("gate", adapter_name) is not None:
            for source in sources.domains.values():
                layer.load_domain(adapter_name, source)
            if len(sources.domains) == 1:
                layer.load_gate(adapter_name, source)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str):
        found = CellTuner._check_target_module_exists(peft_config, key)
        if found and peft_config.task_reduction is None and not peft_config.hosts(key):
            return False
        return found

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        kind = model_config.get("model_type")
        targets, excluded = peft_config.target_modules, _EXCLUDED.get(str(kind), [])
        if excluded and (targets is None or (not isinstance(targets, str) and targets == set(_TARGETS[str(kind)]))):
            if not isinstance(peft_config.exclude_modules, str):
                peft_config.exclude_modules = {*(peft_config.exclude_modules or ()), *excluded}
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        if peft_config.domain_layers is None:
            layers = _number_of_layers(model_config)
            chosen = isinstance(peft_config.target_modules, str) or peft_config.layers_to_transform is not None
            if chosen or layers is None:
                peft_config.domain_layers = "all"
            else:
                peft_config.domain_layers = sorted({depth * layers // _PAPER_LAYERS for depth in _DEPTHS})
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        # Everything that can be wrong with config and model together, before the model is touched.
        if peft_config.target_modules == "all-linear":
            return
        keys = [key for key, _ in model.named_modules() if ".base_layer" not in key]
        matched = [key for key in keys if key and self._check_target_module_exists(peft_config, key)]
        hosts = [key for key in matched if peft_config.hosts(key)]
        _check_layers(peft_config, hosts, bool(matched))
        _check_pooling(peft_config, model, hosts)
        if peft_config._sources is not None:
            peft_config.with_base(getattr(model, "name_or_path", None))
            for source in peft_config._sources.domains.values():
                source.check_paths(hosts)
                for key in hosts:
                    _check_fit(source, key, model, peft_config)

    def add_domain(self, domain: str, source: str | os.PathLike, adapter_name: str | None = None) -> None:
        """Plugs a finished domain adapter into an adapter that is in the model.

        The gate keeps its rows and gets one for the new domain, which starts like a fresh one: train the gate again,
        with an optimizer made after this call.

        Args:
            domain (`str`): Its name here.
            source (`str` or `PathLike`): Folder or Hub id of a first-stage adapter.
            adapter_name (`str`, *optional*): The adapter; the active one if left out.

        Raises:
            ValueError: The domain is there already, or its adapter does not fit. Nothing is changed then.
        """
        adapter_name, config = self._adapter(adapter_name)
        if domain in config.domains:
            raise ValueError(f"`domain` {domain!r} is one of the domains already: {config.domains}.")
        check_domains([*config.domains, domain])
        found = DomainSources({domain: source})
        found.check_base(getattr(self.model, "name_or_path", None))
        new = found.domains[domain]
        for name in ("reduction", "activation"):
            if getattr(new.config, name) != getattr(config, name):
                raise ValueError(
                    f"`{name}` is {getattr(new.config, name)!r} in the adapter of the domain {domain!r} and "
                    f"{getattr(config, name)!r} in {adapter_name!r}; they must be equal."
                )
        layers = [layer for layer in self._layers() if layer.cell("gate", adapter_name) is not None]
        if not layers:
            raise ValueError(
                f"`adapter_name` {adapter_name!r} was made without domains. Make a new one with "
                "`MixdaConfig.from_domains`."
            )
        new.check_paths([layer.name for layer in layers])
        for layer in layers:
            new.check_shapes(layer.name, layer.new_expert(config))
        for layer in layers:
            layer.add_domain(adapter_name, new, config)
        config.domains = [*config.domains, domain]
        if config.enabled_domains is not None:
            config.enabled_domains = [*config.enabled_domains, domain]
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def remove_domain(self, domain: str, adapter_name: str | None = None) -> None:
        """Takes a domain out for good, with its row of the gate. An optimizer made before is of no use after it.

        Args:
            domain (`str`): Its name.
            adapter_name (`str`, *optional*): The adapter; the active one if left out.

        Raises:
            ValueError: There is no such domain, or it is the last one.
        """
        adapter_name, config = self._adapter(adapter_name)
        self._known([domain], config)
        if len(config.domains) == 1:
            raise ValueError(
                f"`domain` {domain!r} is the only one of {adapter_name!r}. Delete the adapter, or switch the domain "
                "off with `set_domains([])`."
            )
        for layer in self._layers():
            if layer.cell("gate", adapter_name) is not None:
                layer.remove_domain(adapter_name, domain)
        config.domains = [name for name in config.domains if name != domain]
        if config.enabled_domains is not None:
            config.enabled_domains = [name for name in config.enabled_domains if name != domain]
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_domains(self, domains: Sequence[str] | None = None, adapter_name: str | None = None) -> None:
        """Chooses the domains that take part. The gate's weights of those and of the feed-forward network are
        normalised among themselves; with none, the layer is the base's. The choice is saved with the adapter.

        Args:
            domains (`Sequence[str]`, *optional*): Names; all if left out.
            adapter_name (`str`, *optional*): The adapter; the active one if left out.

        Raises:
            ValueError: There is no such domain.
        """
        adapter_name, config = self._adapter(adapter_name)
        chosen = None if domains is None else check_domains(domains)
        self._known(chosen or (), config)
        config.enabled_domains = chosen
        for layer in self._layers():
            gate = layer.cell("gate", adapter_name)
            if gate is not None:
                gate.enabled = config.in_use

    def _layers(self) -> Iterator[MixdaLayer]:
        return (module for module in self.model.modules() if isinstance(module, MixdaLayer))

    def _adapter(self, adapter_name: str | None) -> tuple[str, MixdaConfig]:
        name = self.active_adapters[0] if adapter_name is None else adapter_name
        config: Any = self.peft_config.get(name)
        if config is None:
            raise ValueError(
                f"`adapter_name` {name!r} is no adapter of the model. There are {list(self.peft_config)}."
            )
        return name, config

    @staticmethod
    def _known(domains: Sequence[str], config: MixdaConfig) -> None:
        unknown = [name for name in domains if name not in config.domains]
        if unknown:
            raise ValueError(f"`domains` must be some of {config.domains}, got {', '.join(map(repr, unknown))}.")


def _number_of_layers(model_config: dict) -> int | None:
    for part in (model_config, model_config.get("text_config") or {}):
        for name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers"):
            if isinstance(part.get(name), int):
                return part[name]
    return None


def _check_layers(config: MixdaConfig, hosts: list[str], matched: bool) -> None:
    if isinstance(config.domain_layers, list) and matched:
        missing = sorted(set(config.domain_layers) - {layer_number(key) for key in hosts})  # pyright: ignore
        if missing:
            raise ValueError(
                f"`domain_layers` are {config.domain_layers}, but `target_modules` match nothing in layers {missing}. "
                "Layers are counted from 0."
            )


def _check_pooling(config: MixdaConfig, model: Any, hosts: list[str]) -> None:
    if config.gate_pooling != "mean" or not (hasattr(model, "can_generate") and model.can_generate()):
        return
    two = getattr(model.config, "is_encoder_decoder", False)
    causal = [key for key in hosts if not two or "decoder" in key.split(".")]
    if causal:
        advice = " Or adapt the encoder alone, with a regular expression." if two else ""
        raise ValueError(
            f"`gate_pooling='mean'` cannot be used in {type(model).__name__} ({causal[0]!r}): every position would "
            f"see those after it, and generation with a cache would not. Use 'token'.{advice}"
        )


def _check_fit(source: Any, key: str, model: nn.Module, config: MixdaConfig) -> None:
    target = model.get_submodule(key)
    layer = target if isinstance(target, MixdaLayer) else MixdaLayer(target, name=key)
    source.check_shapes(key, layer.new_expert(config))
