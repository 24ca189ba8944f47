"""Classes by name, for config fields that choose one: registered by a decorator, imported when first asked for."""

import difflib
import importlib
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar


__all__ = ["NamedClasses"]

C = TypeVar("C")


class NamedClasses(Generic[C]):
    """The classes one config field can name.

    Args:
        field (`str`): The config field, `"router_type"`; each class gets its own name under it.
        noun (`str`): What the classes are, for messages.
        package (`str`): `__package__` of the caller.
        builtin (`Mapping[str, str]`): One line per class of this package: its name and the module of `package` that
            registers it.

    Example:

    ```python
    >>> ROUTERS = NamedClasses("router_type", "router", __package__, {"softmax_topk": "topk"})
    ```
    """

    def __init__(self, field: str, noun: str, package: str, builtin: Mapping[str, str]):
        self.field = field
        self.noun = noun
        self.package = package
        self.builtin = dict(builtin)
        self._classes: dict[str, type[C]] = {}

    def register(self, name: str) -> Callable[[type[C]], type[C]]:
        """Class decorator that makes a class available as `name`.

        Raises:
            ValueError: another class already has that name.
        """

        def decorate(cls: type[C]) -> type[C]:
            known = self._classes.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(
                    f"`{self.field}={name!r}` is already taken by {known.__qualname__}; choose another name."
                )
            self._classes[name] = cls
            setattr(cls, self.field, name)
            return cls

        return decorate

    def __delitem__(self, name: str) -> None:
        del self._classes[name]

    def names(self) -> list[str]:
        """Every name, sorted."""
        return sorted({*self.builtin, *self._classes})

    def get(self, name: str) -> type[C]:
        """The class called `name`.

        Raises:
            ValueError: none; the message lists the names there are and the nearest one.
        """
        if name not in self._classes and name in self.builtin:
            importlib.import_module(f".{self.builtin[name]}", self.package)
        if name in self._classes:
            return self._classes[name]
        near = difflib.get_close_matches(str(name), self.names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"`{self.field}={name!r}` is not a known {self.noun}. Choose one of {self.names()}.{hint}")
