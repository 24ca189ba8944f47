"""Finished domain adapters as files: read strictly, because an adapter that is silently not loaded looks trained."""

import os
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig
from safetensors import safe_open
from transformers.utils.hub import cached_file


__all__ = ["DomainSource", "DomainSources"]

if TYPE_CHECKING:
    from .config import MixdaConfig

PREFIX = "hfmoe_mixda_"
# What the weights of a domain adapter fit to; different values cannot be put together.
_STRICT = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "domain_layers")
_STRICT += ("reduction", "activation")
# What the gate that mixed them was like; these may be chosen anew.
_GATE = ("mix_form", "gate_activation", "gate_pooling", "gate_hidden", "gate_dropout", "gate_init_bias")


class DomainSource:
    """The adapter of one domain in a folder that `save_pretrained` wrote.

    Args:
        name (`str`): The domain's name here.
        folder (`str` or `PathLike`): Folder or Hub id.

    Raises:
        ValueError: There is no MixDA adapter, or it has several domains and none of that name.
    """

    def __init__(self, name: str, folder: str | os.PathLike):
        self.name = name
        self.folder = os.fspath(folder)
        self._file("adapter_config.json")
        self.config: MixdaConfig = PeftConfig.from_pretrained(self.folder)  # pyright: ignore[reportAttributeAccessIssue]
        if getattr(self.config, "type_name", None) != PREFIX[:-1].upper():
            raise ValueError(f"`{self.folder}` (domain {name!r}) holds a {self.config.peft_type} adapter, not MixDA.")
        saved = self.config.domains
        if name not in saved and len(saved) != 1:
            raise ValueError(
                f"`{self.folder}` holds the domains {saved}, and none of them is called {name!r}. Use one of their "
                "names."
            )
        self.saved_name = name if name in saved else saved[0]
        self.weights = self._file("adapter_model.safetensors")

    def _file(self, file: str) -> str:
        cause = None
        try:
            path = cached_file(self.folder, file)
        except OSError as error:
            path, cause = None, error
        if path is None:
            raise ValueError(
                f"There is no `{file}` in `{self.folder}`, given for the domain {self.name!r}. Give a folder that "
                "`save_pretrained` of a MixDA adapter wrote."
            ) from cause
        return path

    @cached_property
    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """The domain's tensors by module path and name inside the adapter."""
        return self._container("expert", f"{self.saved_name}.")

    @cached_property
    def gate(self) -> dict[str, dict[str, torch.Tensor]]:
        """The gate's tensors by module path and name inside the gate."""
        return self._container("gate", "")

    def _container(self, container: str, start: str) -> dict[str, dict[str, torch.Tensor]]:
        found: dict[str, dict[str, torch.Tensor]] = {}
        with safe_open(self.weights, framework="pt") as file:
            for key in file.keys():
                path, _, rest = key.partition(f".{PREFIX}{container}.")
                if rest and rest.startswith(start):
                    path = path.removeprefix("base_model.model.")
                    found.setdefault(path, {})[rest.removeprefix(start)] = file.get_tensor(key)
        return found

    def check_paths(self, paths: Collection[str]) -> None:
        """Refuses modules that do not fit the file.

        Args:
            paths (`Collection[str]`): Paths of the modules that get domain adapters.

        Raises:
            ValueError: The file lacks one of them, or has one more.
        """
        missing = [path for path in paths if self.find(self.tensors, path) is None]
        if missing:
            raise ValueError(
                f"`{self.folder}` has no adapter of the domain {self.name!r} for {', '.join(map(repr, missing))}; it "
                f"has them for {sorted(self.tensors)}. Train the domain with the same layers, or leave it out."
            )
        more = [path for path in self.tensors if not any(same_path(path, other) for other in paths)]
        if more:
            raise ValueError(
                f"`{self.folder}` has adapters of the domain {self.name!r} for {', '.join(map(repr, more))}, where "
                f"this model gets none. Use the same `domain_layers` and `target_modules`."
            )

    @staticmethod
    def find(tensors: dict[str, dict[str, torch.Tensor]], path: str) -> dict[str, torch.Tensor] | None:
        """The tensors of a module, also where one of the two models is the other's backbone."""
        return next((value for other, value in tensors.items() if same_path(path, other)), None)

    def check_shapes(self, path: str, expert: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The tensors for `expert`, which must fit it exactly.

        Args:
            path (`str`): Path of the module beside which it is.
            expert (`nn.Module`): A domain adapter.

        Raises:
            ValueError: A tensor is missing or has another shape.
        """
        tensors = self.find(self.tensors, path) or {}
        state = expert.state_dict()
        wrong = [name for name in state if name not in tensors or tensors[name].shape != state[name].shape]
        if wrong or len(tensors) != len(state):
            have = {name: tuple(value.shape) for name, value in tensors.items()}
            want = {name: tuple(value.shape) for name, value in state.items()}
            raise ValueError(
                f"The adapter of the domain {self.name!r} in `{self.folder}` does not fit {path!r}: it has {have}, "
                f"needed are {want}. Was it trained on another base model?"
            )
        return tensors


class DomainSources:
    """Adapters of several domains that can be put together.

    Args:
        sources (`Mapping[str, str]`): Folder or Hub id by name of the domain.

    Raises:
        ValueError: See [`MixdaConfig.from_domains`].
    """

    def __init__(self, sources: Mapping[str, str | os.PathLike]):
        if not sources:
            raise ValueError("`sources` must name at least one domain.")
        self.domains = {name: DomainSource(name, folder) for name, folder in sources.items()}
        first, *others = self.domains.values()
        for other in others:
            base, another = (source.config.base_model_name_or_path for source in (first, other))
            if base and another and base != another:
                raise ValueError(
                    f"The domains {first.name!r} and {other.name!r} were trained beside different base models: "
                    f"`{base}` and `{another}`."
                )
            for path in first.tensors.keys() ^ other.tensors.keys():
                lacks, has = (first, other) if path in other.tensors else (other, first)
                raise ValueError(
                    f"The file of the domain {lacks.name!r} (`{lacks.folder}`) lacks an adapter for {path!r}, which "
                    f"{has.name!r} has. Train the domains with the same layers."
                )
            self._same(first, other, _STRICT, "Train the domains with the same value.")

    @staticmethod
    def _same(first: DomainSource, other: DomainSource, names: Collection[str], advice: str) -> None:
        for name in names:
            one, two = getattr(first.config, name), getattr(other.config, name)
            if one != two:
                raise ValueError(
                    f"`{name}` is {one!r} in the domain {first.name!r} and {two!r} in {other.name!r}. {advice}"
                )

    def shared_fields(self, skip: Collection[str] = ()) -> dict[str, Any]:
        """The fields that the adapters have in common.

        Args:
            skip (`Collection[str]`): Fields that were chosen otherwise.

        Returns:
            `dict[str, Any]`: Values by name.

        Raises:
            ValueError: The gates differ in a field that is not in `skip`.
        """
        fixed = sorted(set(_STRICT) & set(skip))
        first, *others = self.domains.values()
        for name in fixed:
            raise ValueError(f"`{name}` follows from the domain adapters ({getattr(first.config, name)!r}).")
        gate = [name for name in _GATE if name not in skip]
        for other in others:
            self._same(first, other, gate, f"Say which it shall be: `from_domains(..., {gate[0]}=...)`.")
        return {name: getattr(first.config, name) for name in (*_STRICT, *gate)}

    def check_base(self, name: str | None) -> None:
        """See [`MixdaConfig.with_base`]."""
        for source in self.domains.values():
            base = source.config.base_model_name_or_path
            if name and base and name != base:
                raise ValueError(
                    f"The domain {source.name!r} (`{source.folder}`) was trained beside `{base}`, and this model is "
                    f"`{name}`. Load the same base model. If it is the same under another name, correct "
                    "`base_model_name_or_path` in the adapter's `adapter_config.json`."
                )


def same_path(one: str, two: str) -> bool:
    """Whether two paths mean the same module, one of them perhaps inside a model with a head."""
    return one == two or one.endswith(f".{two}") or two.endswith(f".{one}")
