"""What a MixDA adapter is made of."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.activations import ACT2FN

from hf_moe.adapters.core import MoeAdapterConfig

from .sources import DomainSources


__all__ = ["MixdaConfig"]

STAGES = ("knowledge", "task")
POOLINGS = ("token", "mean", "last")


@dataclass
class MixdaConfig(MoeAdapterConfig):
    """Configuration of MixDA (https://huggingface.co/papers/2306.05406): frozen feed-forward networks with domain
    adapters beside them, and a gate that mixes both.

    A domain adapter `K_j(x) = U_j GELU(D_j x + b) + c` reads the inside of the feed-forward network, the input of its
    last linear map, whose output is `F(x)`. A gate on the same `x` gives weights of `K_1 ... K_n` and `F`. First, each
    domain's adapter is trained alone on the domain's text (`stage="knowledge"`, [`~hf_moe.trainers.MixdaTrainer`]).
    Then [`~MixdaConfig.from_domains`] puts finished ones together, frozen, and gate, task adapter and head are trained
    on labels (`stage="task"`).

    A new adapter does not leave the output bit for bit as it is: zero adapters have a share of the mixture. With the
    default `gate_init_bias` the share of `F` is 0.98; with `mix_form="residual"` the start is exact.

    Note: the paper's gate reads the attention's output in one place and the inside of the feed-forward network in
    another; here it is the latter, as in the released code. That code gates a whole text by its last position;
    `gate_pooling="last"` and `gate_hidden=[768, 768, 768]` do the same.

    Args:
        domains (`list[str]`, defaults to `["domain"]`): Names of the domains. May be empty with a task adapter.
        domain_layers (`list[int]` or `"all"`, *optional*): Layers with domain adapters and gate. Left out: the paper's
            7 and 11 of 24, in proportion; all matched modules if `target_modules` is a regular expression or
            `layers_to_transform` says which.
        reduction (`int`, defaults to 16): Inside of the feed-forward network over bottleneck of a domain adapter.
        activation (`str`, defaults to `"gelu"`): Of the domain adapters.
        gate_hidden (`list[int]`, *optional*): Widths of the gate's hidden layers; one linear map if left out.
        gate_activation (`str`, defaults to `"softmax"`): Or `"sigmoid"`, the paper's formula.
        gate_pooling (`str`, defaults to `"token"`): What the gate reads. `"token"`: each position decides for itself.
            `"mean"`: the mean over the positions of the attention mask decides for the whole text; refused for causal
            language models, where it would look ahead. `"last"`: the last position of the call decides, padding or
            not, so pad on the left; in generation that is the prompt's last token at first, then each new token.
        gate_dropout (`float`, defaults to 0.0): Before each linear map of the gate; 0.2 in the released code.
        gate_init_bias (`float`, defaults to 4.0): The gate's bias for `F` at the start; 0 in the released code.
        mix_form (`str`, defaults to `"mixture"`): `"mixture"`, the paper's `sum_j w_j K_j + w_F F`, or `"residual"`,
            `F + sum_j w_j K_j`.
        stage (`str`, defaults to `"knowledge"`): `"knowledge"` trains domain adapters and gate, `"task"` gate and task
            adapter.
        enabled_domains (`list[str]`, *optional*): Domains in use; all if left out. See `model.set_domains`.
        task_reduction (`int`, *optional*): Adds a task adapter after each matched feed-forward network, in all layers:
            `o + U act(D o)` with a bottleneck of hidden size / `task_reduction` (Pfeiffer's; 16 in the paper).
        task_activation (`str`, defaults to `"silu"`): Of the task adapters.

    Raises:
        ValueError: A field has a value it cannot have. Raised at construction.

    Example:
        ```python
        model = peft.get_peft_model(model, hf_moe.MixdaConfig(domains=["biology"]))
        ```
    """

    type_name = "HFMOE_MIXDA"

    domains: list[str] = field(default_factory=lambda: ["domain"])
    domain_layers: list[int] | str | None = None
    reduction: int = 16
    activation: str = "gelu"
    gate_hidden: list[int] | None = None
    gate_activation: str = "softmax"
    gate_pooling: str = "token"
    gate_dropout: float = 0.0
    gate_init_bias: float = 4.0
    mix_form: str = "mixture"
    stage: str = "knowledge"
    enabled_domains: list[str] | None = None
    task_reduction: int | None = None
    task_activation: str = "silu"

    def __post_init__(self):
        super().__post_init__()
        self._sources: DomainSources | None = None

    def validate(self) -> None:
        """Checks the fields of this type."""
        self.domains = check_domains(self.domains)
        self.domain_layers = check_layers(self.domain_layers)
        self.require("reduction", self.reduction >= 1, "at least 1")
        self.require("task_reduction", self.task_reduction is None or self.task_reduction >= 1, "at least 1 or None")
        for name in ("activation", "task_activation"):
            self.require(name, getattr(self, name) in ACT2FN, "a name of transformers' `ACT2FN`")
        hidden = self.gate_hidden or []
        self.require("gate_hidden", all(isinstance(w, int) and w >= 1 for w in hidden), "None or widths of at least 1")
        self.gate_hidden = list(hidden) or None
        self.require("gate_activation", self.gate_activation in ("softmax", "sigmoid"), "'softmax' or 'sigmoid'")
        self.require("gate_pooling", self.gate_pooling in POOLINGS, f"one of {list(POOLINGS)}")
        self.require("gate_dropout", 0.0 <= self.gate_dropout < 1.0, "at least 0 and below 1")
        self.require("mix_form", self.mix_form in ("mixture", "residual"), "'mixture' or 'residual'")
        self.require("stage", self.stage in STAGES, "'knowledge' or 'task'")
        if self.gate_pooling == "mean" and self.task_type == "CAUSAL_LM":
            raise ValueError(
                "`gate_pooling='mean'` cannot be used with `task_type='CAUSAL_LM'`: every position would see those "
                "after it, and generation would not. Use 'token'."
            )
        if self.enabled_domains is not None:
            unknown = [name for name in self.enabled_domains if name not in self.domains]
            self.require("enabled_domains", not unknown, f"some of `domains` ({self.domains})")
        if not self.domains and self.task_reduction is None:
            raise ValueError("`domains` is empty and `task_reduction` is None: there is nothing to adapt with.")

    def frozen_containers(self) -> tuple[str, ...]:
        """The containers that do not train in the present stage."""
        return ("task",) if self.stage == "knowledge" else ("expert",)

    @property
    def in_use(self) -> list[str]:
        """The domains that are enabled, in the order of `domains`."""
        enabled = self.domains if self.enabled_domains is None else self.enabled_domains
        return [name for name in self.domains if name in enabled]

    def hosts(self, key: str) -> bool:
        """Whether a matched module gets domain adapters and gate.

        Args:
            key (`str`): Its path.
        """
        return not isinstance(self.domain_layers, list) or layer_number(key) in self.domain_layers

    @classmethod
    def from_domains(cls, sources: Mapping[str, str | os.PathLike], **options: Any) -> "MixdaConfig":
        """The config of a second-stage adapter made of finished domain adapters.

        Models that are given this config get the domain adapters' weights. With one domain its gate is kept, unless
        `options` change it; with several the gate starts anew. What is not given is as in the files.

        Args:
            sources (`Mapping[str, str]`): Name of each domain here, and the folder (or Hub id) of its adapter, as
                `save_pretrained` wrote it.
            **options: Other fields; `stage="task"` is the default here.

        Returns:
            [`MixdaConfig`]

        Raises:
            ValueError: A folder holds no MixDA adapter, or several domains and none of that name; the adapters differ
                in base model, layers or form; a name is no possible domain.

        Example:
            ```python
            config = MixdaConfig.from_domains({"biology": "out/biology", "law": "out/law"}, task_type="SEQ_CLS")
            model = peft.get_peft_model(classifier, config)
            ```
        """
        found = DomainSources(sources)
        fields: dict[str, Any] = {"stage": "task"} | found.shared_fields(skip=options.keys()) | options
        fields["domains"] = list(sources)
        config = cls(**fields)
        config._sources = found
        return config

    def with_base(self, name: str | None) -> None:
        """Refuses a base model other than that of the domain adapters.

        Args:
            name (`str`, *optional*): Name or folder of the model at hand.

        Raises:
            ValueError: It is another one.
        """
        if self._sources is not None:
            self._sources.check_base(name)


def check_domains(domains: Any) -> list[str]:
    """The names as a list.

    Raises:
        ValueError: A name occurs twice, is empty, or cannot be a module's.
    """
    if isinstance(domains, str) or not all(isinstance(name, str) for name in domains):
        raise ValueError(f"`domains` must be a list of names, got {domains!r}.")
    names = list(domains)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"`domains` must differ from each other, got {', '.join(map(repr, twice))} more than once.")
    for name in names:
        if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict, name) or name == "training":
            raise ValueError(
                f"`domains` must be words of letters, digits, hyphens and underscores that are no attribute of a "
                f"module, got {name!r}."
            )
    return names


def check_layers(layers: Any) -> list[int] | str | None:
    """`domain_layers` as `None`, `"all"` or a sorted list.

    Raises:
        ValueError: It is something else.
    """
    if layers is None or layers == "all":
        return layers
    numbers = [layers] if isinstance(layers, int) else layers
    if isinstance(numbers, str) or not numbers or not all(isinstance(i, int) and i >= 0 for i in numbers):
        raise ValueError(f"`domain_layers` must be layer numbers from 0 on, or 'all', got {layers!r}.")
    return sorted(set(numbers))


def layer_number(key: str) -> int | None:
    """The first number in a module's path, which counts the layers; `None` if there is none."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", key)
    return int(match[1]) if match else None
