"""The fields every adapter type has, with PEFT's names and meanings."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig

from hf_moe.files import write_text
from hf_moe.registration import ensure_peft_type


__all__ = ["MoeAdapterConfig"]

LOADING = """## Loading

This adapter is a `{config}` of the package hf-moe (`pip install hf-moe`). Import it first: without it PEFT and
transformers end in `KeyError: 'HFMOE_...'`.

```python
import hf_moe
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this repository")
```
"""
_SETS = ("target_modules", "exclude_modules")
_BIAS = ("none",)


@dataclass
class MoeAdapterConfig(PeftConfig):
    """Base of the configs of this package's adapter types.

    A type sets the class attribute `type_name` and overrides [`~MoeAdapterConfig.validate`] for what its own fields
    must satisfy, and [`~MoeAdapterConfig.frozen_containers`] when a training stage trains only a part.

    Args:
        target_modules (`list[str]` or `str`, *optional*): Names (ends of names) of the modules to adapt, a regular
            expression, or `"all-linear"`. Known for common architectures when left out.
        exclude_modules (`list[str]` or `str`, *optional*): Names, or a regular expression, of modules to leave out.
        layers_to_transform (`list[int]` or `int`, *optional*): Adapt only the layers with these numbers.
        layers_pattern (`list[str]` or `str`, *optional*): Name of the list of layers, where it is an unusual one.
        modules_to_save (`list[str]`, *optional*): Modules of the base that are trained in full and saved along.
        trainable_token_indices (`list[int]` or `dict`, *optional*): Rows of the embeddings to train.
        target_parameters (`list[str]`, *optional*): Parameters to adapt that are no module's `weight`, such as
            `"mlp.experts.down_proj"`; only for types that say so.
        bias (`str`, defaults to `"none"`): Only `"none"`: the base's biases stay as they are.
        init_weights (`bool`, defaults to `True`): Start as the type says; `False` draws random weights (for tests).

    Raises:
        ValueError: A field has a value it cannot have. Raised at construction.
        TypeError: A field has a type it cannot have.
    """

    type_name: ClassVar[str]

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    target_parameters: list[str] | None = None
    bias: str = "none"
    init_weights: bool = field(default=True)

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = ensure_peft_type(self.type_name)
        for name in _SETS:
            value: Any = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        if self.bias not in _BIAS:
            raise ValueError(
                f"`bias` must be 'none', got {self.bias!r}: these adapters leave the base's biases alone."
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "`layers_to_transform` cannot be used when `target_modules` is a string. Pass a list of names, or put "
                "the layers into the regular expression."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` needs `layers_to_transform`: the numbers of the layers to adapt.")
        self.validate()

    def validate(self) -> None:
        """Raises for values of the type's own fields that cannot work. Called at construction."""

    def frozen_containers(self) -> tuple[str, ...]:
        """Names of the containers (without prefix) that do not train in the present stage."""
        return ()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes `adapter_config.json`, and into the model card beside it (PEFT's, if there is one) what it takes to
        load the adapter: nothing in the file itself can tell PEFT to import this package.

        Args:
            save_directory (`str`): The folder.
            **kwargs: For PEFT.
        """
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory) / "README.md"
        if card.is_file() and (text := card.read_text(encoding="utf-8")) and "import hf_moe" not in text:
            write_text(card, f"{text.rstrip()}\n\n{LOADING.format(config=type(self).__name__)}")

    def require(self, name: str, condition: bool, allowed: str) -> None:
        """Raises the usual error for field `name` unless `condition` holds.

        Args:
            name (`str`): The field.
            condition (`bool`): Whether its value is allowed.
            allowed (`str`): What is, as in "must be ...".

        Raises:
            ValueError: `condition` is false.
        """
        if not condition:
            raise ValueError(f"`{name}` must be {allowed}, got {getattr(self, name)!r}.")
