"""The dense feed-forward as plain matrices: what every expert builder reads and returns.

Shapes: D hidden, I intermediate.
"""

import re
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from hf_moe.modes import eval_mode

from .split_feed_forward import FIRST, SplitFeedForward


__all__ = [
    "DenseFeedForward",
    "FeedForwardSite",
    "count_layers",
    "extract_feed_forward",
    "find_feed_forwards",
    "locate_feed_forwards",
    "projection_names",
]

# Names of (gate, up, down); the first that fits wins.
PROJECTIONS = (
    ("gate_proj", "up_proj", "down_proj"),  # Llama and everything after it
    (None, "c_fc", "c_proj"),  # GPT-2
    (None, "fc1", "fc2"),  # Phi, CLIP, ViT variants
    (None, "dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, Falcon
    ("wi_0", "wi_1", "wo"),  # T5 1.1
    (None, "wi", "wo"),  # T5
    (None, "up_proj", "down_proj"),
)
ACTIVATION_ATTRIBUTES = ("act_fn", "act", "activation_fn", "activation")
ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "activation")


@dataclass(frozen=True)
class DenseFeedForward:
    """F(x) = W_d (act(W_g x + b_g) * (W_u x + b_u)) + b_d, or W_d act(W_u x + b_u) + b_d without a gate.

    Matrices are stored as `nn.Linear` stores them, whatever the module they came from did.

    Args:
        up (`torch.Tensor` of shape `(I, D)`): W_u.
        down (`torch.Tensor` of shape `(D, I)`): W_d.
        activation (`str`): Name of the activation in `transformers.activations.ACT2FN`.
        gate (`torch.Tensor` of shape `(I, D)`, *optional*): W_g.
        gate_bias, up_bias (`torch.Tensor` of shape `(I,)`, *optional*): b_g, b_u.
        down_bias (`torch.Tensor` of shape `(D,)`, *optional*): b_d.

    Example:

    ```python
    >>> ffn = extract_feed_forward(model.model.layers[0].mlp)
    >>> left, right = ffn.channels(range(0, 32)), ffn.channels(range(32, 64))  # left(x) + right(x) == ffn(x)
    ```
    """

    up: torch.Tensor
    down: torch.Tensor
    activation: str
    gate: torch.Tensor | None = None
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.up.shape[1]

    @property
    def intermediate_size(self) -> int:
        """I."""
        return self.up.shape[0]

    @property
    def gated(self) -> bool:
        """Whether there is a W_g."""
        return self.gate is not None

    @property
    def biased(self) -> bool:
        """Whether any of the three maps has a bias."""
        return any(b is not None for b in (self.gate_bias, self.up_bias, self.down_bias))

    @property
    def gate_up(self) -> torch.Tensor:
        """[W_g; W_u], `(2I, D)`, or W_u alone without a gate: the first matrix of stacked experts."""
        return self.up if self.gate is None else torch.cat([self.gate, self.up])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor there is, by field name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def map(self, function) -> "DenseFeedForward":
        """A copy with `function` applied to every tensor."""
        return replace(self, **{name: function(value) for name, value in self.tensors().items()})

    def intermediate(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What W_d is applied to.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., D)`): Input.

        Returns:
            `torch.Tensor` of shape `(..., I)`.
        """
        act = ACT2FN[self.activation]
        state = F.linear(hidden_states, self.up, self.up_bias)
        if self.gate is None:
            return act(state)
        return act(F.linear(hidden_states, self.gate, self.gate_bias)) * state

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """F(x), `(..., D) -> (..., D)`."""
        return F.linear(self.intermediate(hidden_states), self.down, self.down_bias)

    def channels(self, index: torch.Tensor | range | list[int]) -> "DenseFeedForward":
        """The part of F that goes through the channels `index`: rows of W_g and W_u, columns of W_d.

        b_d belongs to no channel and is kept whole: whoever splits F decides where it goes.
        """
        index = torch.as_tensor(list(index) if isinstance(index, range) else index, device=self.up.device)

        def rows(tensor):
            return None if tensor is None else tensor[index]

        return replace(
            self,
            up=self.up[index],
            down=self.down[:, index],
            gate=rows(self.gate),
            gate_bias=rows(self.gate_bias),
            up_bias=rows(self.up_bias),
        )

    def scaled(self, factor: float) -> "DenseFeedForward":
        """factor * F, folded into W_d and b_d."""
        return self.scaled_parts(down=factor, down_bias=factor)

    def scaled_parts(
        self, gate: float = 1, up: float = 1, down: float = 1, down_bias: float = 1
    ) -> "DenseFeedForward":
        """Each map multiplied by a factor of its own (b_g goes with W_g, b_u with W_u, b_d has its own).

        Products are formed in float32 and cast back; a factor of 1 keeps the very tensor.
        """
        factors = {
            "gate": gate, "gate_bias": gate, "up": up, "up_bias": up, "down": down, "down_bias": down_bias
        }  # fmt: skip
        return replace(self, **{name: _times(tensor, factors[name]) for name, tensor in self.tensors().items()})

    def silenced(self) -> "DenseFeedForward":
        """The same F with W_d = 0 and b_d = 0: output 0, gradient not."""
        return replace(self, down=torch.zeros_like(self.down), down_bias=_zeros_like(self.down_bias))

    def with_down_bias_share(self, share: float) -> "DenseFeedForward":
        """The same F with b_d multiplied by `share`."""
        return self.scaled_parts(down_bias=share)


def _times(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    return tensor if factor == 1 else (tensor.float() * factor).to(tensor.dtype)


def _zeros_like(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else torch.zeros_like(tensor)


@dataclass(frozen=True)
class FeedForwardSite:
    """Where a feed-forward sits in a model.

    Args:
        name (`str`): Module path, e.g. `"model.layers.3.mlp"`; of the first module, where it is two.
        layer_idx (`int`): Index of its layer, 3.
        layer_name (`str`): Module path of the layer, `"model.layers.3"`.
        module (`nn.Module`): The feed-forward itself, or a [`SplitFeedForward`] of its two modules.
    """

    name: str
    layer_idx: int
    layer_name: str
    module: nn.Module

    @property
    def entry(self) -> nn.Module:
        """The module of the model that receives the feed-forward's input."""
        module: Any = self.module
        return module.fc1 if isinstance(module, SplitFeedForward) else module

    def checkpoint_key(self, name: str) -> str:
        """Key in the model's state dict of a key of the feed-forward's own."""
        if not isinstance(self.module, SplitFeedForward):
            return f"{self.name}.{name}"
        part, _, rest = name.partition(".")
        return f"{self.layer_name}.{SplitFeedForward.PARTS[part]}.{rest}"


def projection_names(module: nn.Module) -> tuple[str | None, str, str] | None:
    """Names of the gate, up and down projection of a plain feed-forward module, `None` where it is none.

    Plain means that the projections own every parameter of the module: a module with further weights (norms,
    attention, scales) computes something else than [`DenseFeedForward`].
    """
    for names in PROJECTIONS:
        present = [n for n in names if n is not None]
        if not all(_is_linear(getattr(module, n, None)) for n in present):
            continue
        own = {id(p) for n in present for p in getattr(module, n).parameters()}
        if all(id(p) in own for p in module.parameters()):
            return names
    return None


def _is_linear(module: Any) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def extract_feed_forward(module: nn.Module, activation: str | None = None, verify: bool = True) -> DenseFeedForward:
    """Reads the matrices of a dense feed-forward module; nothing is copied.

    Args:
        module (`nn.Module`): With `gate_proj/up_proj/down_proj`, `c_fc/c_proj` (GPT-2's transposed `Conv1D`),
            `fc1/fc2`, `dense_h_to_4h/dense_4h_to_h`, or T5's `wi/wo` and `wi_0/wi_1/wo`.
        activation (`str`, *optional*): Name of the activation; found out from the module by default.
        verify (`bool`, defaults to `True`): Compare with the module's own output on three random tokens.

    Returns:
        [`DenseFeedForward`]

    Raises:
        ValueError: the module is of another form; the message names its class.
    """
    names = projection_names(module)
    if names is None:
        raise ValueError(
            f"{type(module).__name__} is not a plain feed-forward: expected linear layers named `gate_proj, up_proj, "
            "down_proj`, `c_fc, c_proj`, `fc1, fc2` or `dense_h_to_4h, dense_4h_to_h` and no other parameters."
        )
    weights: dict[str, Any] = {}
    for part, name in zip(("gate", "up", "down"), names, strict=True):
        if name is not None:
            linear = getattr(module, name)
            weight = linear.weight.detach()
            weights[part] = weight.t() if isinstance(linear, Conv1D) else weight
            bias = getattr(linear, "bias", None)
            weights[f"{part}_bias"] = None if bias is None else bias.detach()
    ffn = DenseFeedForward(activation=activation or _activation_name(module), **weights)
    if verify and ffn.up.device.type != "meta":
        _verify(module, ffn)
    return ffn


def _activation_name(module: nn.Module) -> str:
    config = getattr(module, "config", None)
    for field in ACTIVATION_FIELDS:
        name = getattr(config, field, None)
        if isinstance(name, str) and name in ACT2FN:
            return name
    for attribute in ACTIVATION_ATTRIBUTES:
        function = getattr(module, attribute, None)
        if function is None:
            continue
        # The modules behind the names carry no name; the first name whose module looks the same will do.
        for name in ACT2FN:
            candidate = ACT2FN[name]
            if type(candidate) is type(function) and repr(candidate) == repr(function):
                return name
    raise ValueError(
        f"cannot tell the activation function of {type(module).__name__}; pass `activation`, one of {sorted(ACT2FN)}."
    )


@torch.no_grad()
def _verify(module: nn.Module, ffn: DenseFeedForward) -> None:
    probe = torch.randn(3, ffn.hidden_size, generator=torch.Generator().manual_seed(0))
    probe = probe.to(ffn.up.device, ffn.up.dtype)
    try:
        with eval_mode(module):
            expected = module(probe[None])[0]
    except Exception as error:
        raise ValueError(
            f"{type(module).__name__} does not map hidden states `(B, S, D)` to `(B, S, D)`: {error}"
        ) from error
    got = ffn.map(torch.Tensor.float)(probe.float())
    tolerance = 1e-3 if ffn.up.dtype == torch.float32 else 5e-2
    gap = float((expected.float() - got).norm() / expected.float().norm().clamp_min(1e-30))
    if not gap <= tolerance:
        raise ValueError(
            f"{type(module).__name__} has the layers of a plain feed-forward but computes something else (relative "
            f"difference {gap:.2g} with activation {ffn.activation!r}), so it cannot be turned into experts."
        )


def find_feed_forwards(model: nn.Module) -> list[FeedForwardSite]:
    """Every plain feed-forward that sits in a numbered layer and is no expert already, in module order."""
    mixtures = tuple(f"{n.rpartition('.')[0]}." for n, _ in model.named_modules() if n.endswith(".experts"))
    sites = []
    for name, module in model.named_modules():
        path = name.split(".")
        numbers = [i for i, part in enumerate(path) if part.isdigit()]
        if not numbers or numbers[-1] == len(path) - 1 or name.startswith(mixtures):
            continue
        layer = model.get_submodule(name.rpartition(".")[0])
        if path[-1] == FIRST and SplitFeedForward.fits(layer):
            module = SplitFeedForward(layer)
        if projection_names(module) is not None:
            position = _layer_position(model, path, numbers)
            layer_name = ".".join(path[: position + 1])
            sites.append(FeedForwardSite(name, int(path[position]), layer_name, module))
    return sites


def _layer_position(model: nn.Module, path: list[str], numbers: list[int]) -> int:
    """Which number of a path is the layer's: the last, unless it counts the unlike parts of one layer (T5)."""
    for position in reversed(numbers):
        kinds = {type(child) for child in model.get_submodule(".".join(path[:position])).children()}
        if len(kinds) == 1:
            return position
    return numbers[-1]


def count_layers(model: nn.Module, sites: list[FeedForwardSite]) -> int:
    """Layers in the stack that `sites` are in; of all stacks, in an encoder-decoder model."""
    if _has_two_stacks(model):
        return sum(_stack_sizes(model, find_feed_forwards(model)).values())
    return next(iter(_stack_sizes(model, sites[:1]).values()))


def _stack_sizes(model: nn.Module, sites: list[FeedForwardSite]) -> dict[str, int]:
    stacks = dict.fromkeys(site.layer_name.rpartition(".")[0] for site in sites)
    return {stack: sum(1 for _ in model.get_submodule(stack).children()) for stack in stacks}


def _has_two_stacks(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _choose_in_both_stacks(
    model: nn.Module, sites: list[FeedForwardSite], layers: str | list[int]
) -> list[FeedForwardSite]:
    """`layers` of the encoder and of the decoder; the decoder's are counted on from the encoder's."""
    sizes, before, found = _stack_sizes(model, sites), 0, []
    chosen: set[str] | None = None
    if isinstance(layers, str) and not _is_selection(layers):
        chosen = {site.name for site in _by_pattern(sites, layers, type(model).__name__)}
    for stack, size in sizes.items():
        indices = _indices(layers, size) if chosen is None else []
        for site in sites:
            if site.layer_name.rpartition(".")[0] == stack and (
                site.layer_idx in indices if chosen is None else site.name in chosen
            ):
                found.append(replace(site, layer_idx=before + site.layer_idx))
        before += size
    if not found:
        raise ValueError(f"`layers={layers!r}` selects none of the layers of {type(model).__name__}.")
    return found


def _is_selection(layers: str) -> bool:
    return layers in ("all", "first_half", "second_half") or bool(_every(layers))


def locate_feed_forwards(model: nn.Module, layers: str | list[int] = "all") -> list[FeedForwardSite]:
    """The feed-forwards that are to become MoE layers.

    Args:
        model (`nn.Module`): Any transformers model.
        layers (`str` or `list[int]`, defaults to `"all"`): `"all"`, `"every:m"` (layers m - 1, 2m - 1, ...),
            `"every:m:i"` (from layer i on), `"first_half"`, `"second_half"`, indices, or a regular expression that
            module paths are searched with. In an encoder-decoder model, of each of the two stacks; in one whose
            language model is fed by other towers, of the language model.

    Returns:
        `list[FeedForwardSite]`: In layer order; decoder layers are counted on from the encoder's.

    Raises:
        ValueError: nothing to upcycle (names the class), an index out of range (says the range), a bad pattern.
    """
    kind = type(model).__name__
    sites = find_feed_forwards(model)
    if not sites:
        moe = next((n for n, _ in model.named_modules() if n.endswith(".experts")), None)
        why = f"it is already a Mixture-of-Experts (`{moe}`)" if moe else "no layer has a plain feed-forward"
        raise ValueError(
            f"{kind} cannot be upcycled: {why}. Supported are modules with `gate_proj, up_proj, down_proj`, "
            "`c_fc, c_proj`, `fc1, fc2`, `wi, wo` or `dense_h_to_4h, dense_4h_to_h`."
        )
    if _has_two_stacks(model):
        return _choose_in_both_stacks(model, sites, layers)
    if isinstance(layers, str) and not _is_selection(layers):
        return _by_pattern(sites, layers, kind)
    sites = _of_the_language_model(model, sites)
    stacks = sorted({s.layer_name.rpartition(".")[0] for s in sites})
    if len(stacks) > 1:
        raise ValueError(
            f"{kind} has feed-forwards in several stacks of layers ({', '.join(stacks)}), so `layers={layers!r}` is "
            f"ambiguous: pass a regular expression such as {re.escape(stacks[0])!r}."
        )
    num_layers = sum(1 for _ in model.get_submodule(stacks[0]).children())
    chosen = _indices(layers, num_layers)
    by_index = {s.layer_idx: s for s in sites}
    if len(by_index) < len(sites):
        twice = next(s for s in sites if by_index[s.layer_idx] is not s)
        raise ValueError(
            f"{kind} has several feed-forwards in one layer (`{twice.name}`, `{by_index[twice.layer_idx].name}`): "
            "pass a regular expression as `layers` that selects one of them."
        )
    missing = [i for i in chosen if i not in by_index]
    if missing and not (isinstance(layers, str)):
        raise ValueError(
            f"`layers` names {missing}, which have no plain feed-forward in {kind}; those that do are "
            f"{sorted(by_index)}."
        )
    found = [by_index[i] for i in chosen if i in by_index]
    if not found:
        raise ValueError(f"`layers={layers!r}` selects none of the {num_layers} layers of {kind}.")
    return found


def _of_the_language_model(model: Any, sites: list[FeedForwardSite]) -> list[FeedForwardSite]:
    """Of a language model that is fed by other towers, its own feed-forwards; all of any other model."""
    language_model = getattr(getattr(model, "base_model", None), "language_model", None)
    if not isinstance(language_model, nn.Module):
        return sites
    own = {id(module) for module in language_model.modules()}
    return [site for site in sites if id(site.module) in own] or sites


def _every(layers: str) -> slice | None:
    """Where `"every:m"` (from m - 1 on) and `"every:m:i"` (from i on) lead, `None` for anything else."""
    prefix, _, numbers = layers.partition(":")
    if prefix != "every":
        return None
    step, _, first = numbers.partition(":")
    if not step.isdigit() or int(step) < 1 or not (first.isdigit() or step == numbers):
        raise ValueError(
            f"`layers={layers!r}` must be 'every:<m>' with a whole number m of at least 1, or 'every:<m>:<first>'."
        )
    return slice(int(first or int(step) - 1), None, int(step))


def _indices(layers: str | list[int], num_layers: int) -> list[int]:
    everything = list(range(num_layers))
    if layers == "all":
        return everything
    if layers == "first_half":
        return everything[: num_layers // 2]
    if layers == "second_half":
        return everything[num_layers // 2 :]
    if isinstance(layers, str):
        return everything[_every(layers) or slice(0)]
    indices = list(layers)
    wrong = [i for i in indices if isinstance(i, bool) or not isinstance(i, int)]
    if wrong:
        raise TypeError(f"`layers` must be a list of integers, got {wrong[0]!r} in it.")
    outside = [i for i in indices if not 0 <= i < num_layers]
    if outside:
        raise ValueError(
            f"`layers` has {outside}, but the model has {num_layers} layers: use indices from 0 to {num_layers - 1}."
        )
    if len(set(indices)) != len(indices):
        raise ValueError(f"`layers` names a layer twice: {indices}.")
    return sorted(indices)


def _by_pattern(sites: list[FeedForwardSite], pattern: str, kind: str) -> list[FeedForwardSite]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"`layers={pattern!r}` is neither 'all', 'every:<m>', 'first_half', 'second_half' nor a regular "
            f"expression ({error})."
        ) from error
    found = [s for s in sites if expression.search(s.name)]
    if not found:
        names = ", ".join(s.name for s in sites[:3])
        raise ValueError(
            f"`layers={pattern!r}` matches no feed-forward of {kind}. Use 'all', 'every:<m>', 'first_half', "
            f"'second_half', indices, or a regular expression for names such as {names}."
        )
    return found
