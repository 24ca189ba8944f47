"""What the adapters of a model need to know about the current forward call: a modality map, a guidance scale, a mask.

One hook on the base model writes it into one plain object that all layers share. That object travels with pickles and
deep copies, and the recomputation of gradient checkpointing finds in it what the forward call had.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_moe.views import in_backward


__all__ = ["Runtime", "condition", "install_runtime", "runtime_of"]

_ATTRIBUTE = "_hfmoe_runtime"


class Runtime:
    """The conditions of the current forward call.

    Args:
        parameters (`tuple[str, ...]`): Names of the base model's positional forward parameters.

    Example:
        ```python
        runtime.get("attention_mask")  # what the running forward call was given, or None
        ```
    """

    def __init__(self, parameters: tuple[str, ...] = ()):
        self.parameters = parameters
        self.reads: set[str] = set()
        self.takes: set[str] = set()
        self.kept: set[str] = set()
        self.given: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        self.handles: list[Any] = []
        self._derived: dict[str, Any] = {}
        self._rows: torch.Tensor | None = None
        self._batch = 0
        self._has_grad = False
        self._will_recompute = False
        self._recomputed = False
        self._overwritten = False

    def declare(self, reads: Iterable[str] = (), takes: Iterable[str] = ()) -> None:
        """Says what to keep of a forward call.

        Args:
            reads (`Iterable[str]`): Arguments of the base model that are copied; `"input"` is the first one.
            takes (`Iterable[str]`): Additional keyword arguments that are taken out before the base model sees them;
                [`condition`] sets them too.
        """
        self.reads.update(reads)
        self.takes.update(takes)

    def capture(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The hook: remembers the call's arguments, and returns them without those that only adapters understand."""
        named = dict(zip(self.parameters, args, strict=False)) | kwargs
        values = {name: named[name] for name in self.reads if named.get(name) is not None}
        if "input" in self.reads:
            values["input"] = args[0] if args else next(v for v in kwargs.values() if isinstance(v, torch.Tensor))
        values |= self.given
        values |= {name: kwargs[name] for name in self.takes if kwargs.get(name) is not None}
        if not torch.compiler.is_compiling() and not in_backward():
            self._watch(values)
        self.values = values
        self._derived = {}
        return args, {name: value for name, value in kwargs.items() if name not in self.takes}

    def _watch(self, values: dict[str, Any]) -> None:
        if self._recomputed:  # the backward pass of the last call has been here
            self._will_recompute = self._overwritten = self._recomputed = False
        if self._will_recompute and not _same(values, self.values):
            self._overwritten = True
        self._has_grad = torch.is_grad_enabled()

    def check_recomputation(self) -> None:
        """Called by each layer that runs: refuses to recompute a call whose conditions a later call has replaced.

        Raises:
            RuntimeError: Gradient checkpointing repeats a call after another one with other conditions.
        """
        if torch.compiler.is_compiling():
            return
        if not in_backward():
            self._will_recompute = self._will_recompute or self._is_checkpointed()
        else:
            self._recomputed = True
            if self._overwritten:
                raise RuntimeError(
                    "Gradient checkpointing repeats a forward call, but a later call of the same model had other "
                    "inputs or conditions, so the repetition would be wrong. Run `backward()` after each forward "
                    "call, or turn gradient checkpointing off."
                )

    def _is_checkpointed(self) -> bool:
        # Reentrant checkpointing turns gradients off inside, the other kind has hooks for the tensors to be saved.
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        return self._has_grad and (hooks is not None or not torch.is_grad_enabled())

    def get(self, name: str, default: Any = None) -> Any:
        """A condition of this call.

        Args:
            name (`str`): Its name.
            default (*optional*): Returned when it was not given.

        Returns:
            The value; inside a mixed batch only the rows of the adapter that asks.
        """
        return self._select(self.values.get(name, self.given.get(name, default)))

    def derive(self, name: str, compute: Callable[["Runtime"], Any]) -> Any:
        """A value that follows from the conditions, computed once per call.

        Args:
            name (`str`): Its name.
            compute (`Callable`): Called with this object when the value is first asked for in a call.

        Returns:
            What `compute` returned.
        """
        if name not in self._derived:
            rows, self._rows = self._rows, None  # for the whole batch: other adapters' rows ask too
            try:
                self._derived[name] = compute(self)
            finally:
                self._rows = rows
        return self._select(self._derived[name])

    def keep_output(self, module: nn.Module, name: str) -> None:
        """Keeps what a module of the base returns in each call, for [`Runtime.kept_output`].

        Args:
            module (`nn.Module`): Some module that runs before the one that will ask.
            name (`str`): Name of the value. Asking for the same one again adds no second hook.
        """
        if name not in self.kept:
            self.kept.add(name)
            self.handles.append(module.register_forward_hook(partial(_keep, self, name)))

    def kept_output(self, name: str) -> Any:
        """What the module of [`Runtime.keep_output`] returned in this call.

        Raises:
            RuntimeError: It has not run before the one that asks.
        """
        if name not in self._derived:
            raise RuntimeError(f"{name!r} has not run in this forward call before the adapter that reads its output.")
        return self._select(self._derived[name])

    @contextmanager
    def rows(self, index: torch.Tensor, batch: int) -> Iterator[None]:
        """Inside, values with `batch` rows are reduced to the rows `index`, for one adapter of a mixed batch."""
        before = (self._rows, self._batch)
        self._rows, self._batch = index, batch
        try:
            yield
        finally:
            self._rows, self._batch = before

    def _select(self, value: Any) -> Any:
        if self._rows is None or not isinstance(value, torch.Tensor) or value.ndim == 0:
            return value
        return value[self._rows] if value.shape[0] == self._batch else value


def _keep(runtime: Runtime, name: str, module: nn.Module, args: tuple, output: Any) -> None:
    runtime._derived[name] = output[0] if isinstance(output, tuple) else output


def _same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        return a is b or (not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor) and a == b)

    return left.keys() == right.keys() and all(equal(value, right[name]) for name, value in left.items())


def runtime_of(model: Any) -> Runtime | None:
    """The runtime of a model that has adapters which need one.

    Args:
        model (`nn.Module`): Base model, PEFT model or tuner.

    Returns:
        [`Runtime`] or `None`.
    """
    for module in model.modules():
        if _ATTRIBUTE in module.__dict__:
            return module.__dict__[_ATTRIBUTE]
    return None


def install_runtime(model: nn.Module, reads: Iterable[str] = (), takes: Iterable[str] = ()) -> Runtime:
    """Puts the hook on `model`, once however many adapters ask for it.

    Args:
        model (`nn.Module`): The base model.
        reads (`Iterable[str]`): See [`Runtime.declare`].
        takes (`Iterable[str]`): See [`Runtime.declare`].

    Returns:
        [`Runtime`]
    """
    runtime = model.__dict__.get(_ATTRIBUTE)
    if runtime is None:
        parameters = inspect.signature(model.forward).parameters.values()
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        runtime = Runtime(tuple(p.name for p in parameters if p.kind in positional))
        runtime.handles.append(model.register_forward_pre_hook(runtime.capture, with_kwargs=True))
        model.__dict__[_ATTRIBUTE] = runtime
    runtime.declare(reads, takes)
    return runtime


def remove_runtime(model: nn.Module) -> None:
    """Takes the hooks off `model`; does nothing where there are none.

    Args:
        model (`nn.Module`): The base model.
    """
    runtime = model.__dict__.pop(_ATTRIBUTE, None)
    if runtime is not None:
        for handle in runtime.handles:
            handle.remove()


@contextmanager
def condition(model: nn.Module, **values: Any) -> Iterator[None]:
    """Inside, every forward call of `model` has these conditions: the way in for `generate` and pipelines, which
    refuse arguments they do not know.

    Args:
        model (`nn.Module`): A model with adapters that take such conditions.
        **values: Conditions by name, such as `modality_mask=mask`.

    Raises:
        ValueError: No adapter of `model` takes a condition of that name.

    Example:
        ```python
        with condition(model, modality_mask=mask):
            model.generate(**inputs)
        ```
    """
    runtime = runtime_of(model)
    known = sorted(runtime.takes) if runtime is not None else []
    unknown = sorted(values.keys() - set(known))
    if runtime is None or unknown:
        raise ValueError(
            f"No adapter of `model` takes {', '.join(map(repr, unknown))}; it takes {known or 'nothing'}."
        )
    before = dict(runtime.given)
    runtime.given.update(values)
    try:
        yield
    finally:
        runtime.given.clear()
        runtime.given.update(before)
