"""Stacked experts some of which run beside the bank, and a router with weights of its own.

Shapes: T tokens, D hidden, I intermediate, N experts, K per token, M experts of a slice, A tokens sent to one expert.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn
from torch.nn import functional as F

from hf_moe.adapters.core import BlockLayer, bypass


__all__ = ["BankLayer", "RouterLayer", "SliceLayer", "bank_parameters", "bypass_slices", "router_parameters"]


def bank_parameters(bank: Any) -> dict[str, nn.Parameter]:
    """The stacked parameters of an experts module, by name.

    Args:
        bank (`nn.Module`): Experts on transformers' contract.

    Returns:
        `dict[str, nn.Parameter]`: Each with the expert as first axis.
    """
    up = "gate_up_proj" if bank.has_gate else "up_proj"
    names = (up, "down_proj", f"{up}_bias", "down_proj_bias") if bank.has_bias else (up, "down_proj")
    return {name: getattr(bank, name) for name in names}


def router_parameters(router: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a router that a gradient reaches: all but selection biases, which only choose."""
    return {name: p for name, p in router.named_parameters() if "score_correction_bias" not in name}


class Slices(nn.Module):
    """Trainable copies of tensors. Names may have dots, which parameters of a module may not."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], init_weights: bool = True):
        super().__init__()
        for name, tensor in tensors.items():
            parameter = nn.Parameter(torch.empty_like(tensor))
            self.register_parameter(name.replace(".", "__"), parameter)
        with torch.no_grad():
            for name, tensor in tensors.items():  # in place: the copies may be on the meta device
                parameter = getattr(self, name.replace(".", "__"))
                parameter.copy_(tensor.detach())
                if not init_weights:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)

    def __getitem__(self, name: str) -> torch.Tensor:
        return getattr(self, name.replace(".", "__"))


class SliceLayer(BlockLayer):
    """What both layers share: which tensors the active adapters put in the place of the base's, merging, refusals.

    One adapter's copy takes the base's place as it is. Where several active adapters have a copy of the same tensor,
    their changes are added up: base + sum_a (copy_a - base).
    """

    prefix: ClassVar[str] = "hfmoe_expert_slice_"
    containers: ClassVar[tuple[str, ...]] = ("bank", "router")

    def __init__(self, base_layer: nn.Module, runtime: Any = None, name: str = ""):
        super().__init__(base_layer, runtime, name)
        self._before_merge: dict[Any, torch.Tensor] = {}

    def copies(self, adapter_name: str) -> dict[Any, torch.Tensor]:
        """The adapter's copies, by a key of `place`; empty if it has none here."""
        raise TypeError(f"{type(self).__name__} must override `copies`.")

    def place(self, key: Any) -> torch.Tensor:
        """The base's own tensor: a view, so that merging can write to it."""
        raise TypeError(f"{type(self).__name__} must override `place`.")

    def in_place_of(self, adapter_names: list[str]) -> dict[Any, torch.Tensor]:
        """What stands for the base's tensors while these adapters are active, in the base's dtype."""
        found: dict[Any, torch.Tensor] = {}
        for adapter_name in adapter_names:
            for key, copy in self.copies(adapter_name).items():
                found[key] = copy if key not in found else found[key] + (copy - self.place(key).detach())
        return {key: tensor.to(self.place(key).dtype) for key, tensor in found.items()}

    def working_adapters(self, adapter_names: list[str] | None) -> list[str]:
        """Adapters the present call runs with; none when disabled or merged.

        Raises:
            ValueError: `adapter_names` was given: rows of a batch are mixed inside the experts.
        """
        if adapter_names is not None:
            raise ValueError(
                f"`adapter_names` cannot be used with expert slices ({self.name!r}): experts see the tokens of all "
                "rows together. Call the model once per adapter."
            )
        if self.disable_adapters and self.merged:
            self.unmerge()
        return [] if self.disable_adapters or self.merged else [n for n in self.active_adapters if self.has(n)]

    def merge_refusal(self, adapter_name: str) -> str | None:
        """Why an adapter cannot be merged, or `None` if it can."""
        return None

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes the adapters' copies into the base's parameters; what was there is kept for `unmerge`.

        Args:
            safe_merge (`bool`, defaults to `False`): Look for values that are not finite first.
            adapter_names (`list[str]`, *optional*): Which; the active ones if left out.

        Raises:
            ValueError: `safe_merge` found a value that is not finite; the base is as it was.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.has(name)]
        if not names:
            return
        merged = list(self.merged_adapters)
        self.unmerge()  # the sum of changes is taken from the base's own values
        tensors = self.in_place_of([*merged, *names])
        if safe_merge and not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            if merged:
                self.merge(adapter_names=merged)
            raise ValueError(f"NaNs detected in the merged weights. The adapters {names} seem to be broken")
        self._before_merge = {key: self.place(key).detach().clone() for key in tensors}
        for key, tensor in tensors.items():
            self.place(key).copy_(tensor)
        self.merged_adapters.extend([*merged, *names])

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts back what `merge` replaced, bit for bit."""
        for key, tensor in self._before_merge.items():
            self.place(key).copy_(tensor)
        self._before_merge = {}
        self.merged_adapters.clear()


class BankLayer(SliceLayer):
    """Stacked experts, the chosen ones of which run from copies.

    The bank gets weight 0 for them, and w * FFN_copy(x) is added for the tokens routed there; its parameters need no
    gradient. The base's activation, gate, biases and layout are used.

    Args:
        base_layer (`nn.Module`): Experts on transformers' contract.
        runtime (*optional*): Unused.
        name (`str`, *optional*): Path of the module in the model.
    """

    def __init__(self, base_layer: nn.Module, runtime: Any = None, name: str = ""):
        super().__init__(base_layer, runtime, name)
        self.experts_of: dict[str, list[int]] = {}

    def build(self, adapter_name: str, config: Any) -> dict[str, nn.Module]:
        """Copies the experts of this layer that the config lists."""
        experts = config.layers[self.name.rpartition(".")[0]]
        parameters = bank_parameters(self.get_base_layer())
        self.experts_of[adapter_name] = list(experts)
        return {"bank": Slices({name: p[experts] for name, p in parameters.items()}, config.init_weights)}

    def copies(self, adapter_name: str) -> dict[Any, torch.Tensor]:
        """By `(expert, parameter)`."""
        slices = self.cell("bank", adapter_name)
        if slices is None:
            return {}
        names = bank_parameters(self.get_base_layer())
        return {(e, name): slices[name][m] for m, e in enumerate(self.experts_of[adapter_name]) for name in names}

    def place(self, key: Any) -> torch.Tensor:
        """The slice of the bank."""
        expert, name = key
        return getattr(self.get_base_layer(), name)[expert]

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> torch.Tensor:
        """y = bank(x, index, weights without the chosen experts') + sum_e w_e FFN_e(x).

        Args:
            *args: `hidden_states` `(T, D)`, `top_k_index` `(T, K)`, `top_k_weights` `(T, K)`, as the bank gets them.
            adapter_names (`list[str]`, *optional*): Not possible here.
            **kwargs: For the bank.

        Returns:
            `torch.Tensor` of shape `(T, D)`.
        """
        working = self.working_adapters(adapter_names)
        if not working:
            return self.base_layer(*args, **kwargs)
        hidden_states, index, weights = args
        experts: dict[int, dict[str, torch.Tensor]] = {}
        for (expert, name), tensor in self.in_place_of(working).items():
            experts.setdefault(expert, {})[name] = tensor
        hits = {expert: index == expert for expert in experts}  # (T, K) each
        replaced = torch.stack(list(hits.values())).any(dim=0)
        output = self.base_layer(hidden_states, index, weights.masked_fill(replaced, 0.0), **kwargs)
        for expert, tensors in experts.items():
            weight = weights.masked_fill(~hits[expert], 0.0).sum(dim=-1, keepdim=True)  # (T, 1)
            if torch.compiler.is_compiling():  # all tokens: their number per expert would break the graph
                output = output + (self._feed_forward(hidden_states, tensors) * weight).to(output.dtype)
                continue
            rows = hits[expert].any(dim=-1).nonzero().squeeze(-1)  # (A,); A = 0 still gives zero gradients
            state = self._feed_forward(hidden_states[rows], tensors) * weight[rows]
            output = output.index_add(0, rows, state.to(output.dtype))
        return output

    def _feed_forward(self, x: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        bank: Any = self.get_base_layer()
        up = "gate_up_proj" if bank.has_gate else "up_proj"
        x = x.to(tensors[up].dtype)
        state = _linear(x, tensors[up], tensors.get(f"{up}_bias"), bank.is_transposed)  # (A, 2I) or (A, I)
        state = bank._apply_gate(state) if bank.has_gate else bank.act_fn(state)  # (A, I)
        state = _linear(state, tensors["down_proj"], tensors.get("down_proj_bias"), bank.is_transposed)  # (A, D)
        return bank.post_expert_norm(state) if bank.has_post_expert_norm else state

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module):
        parameter = self.get_base_layer().down_proj
        return parameter.device, parameter.dtype


class RouterLayer(SliceLayer):
    """A router that runs with copies of its parameters; hooks on it see no difference."""

    def build(self, adapter_name: str, config: Any) -> dict[str, nn.Module]:
        """Copies the router's parameters."""
        return {"router": Slices(router_parameters(self.get_base_layer()), config.init_weights)}

    def copies(self, adapter_name: str) -> dict[Any, torch.Tensor]:
        """By the parameter's name."""
        slices = self.cell("router", adapter_name)
        return {} if slices is None else {n: slices[n] for n in router_parameters(self.get_base_layer())}

    def place(self, key: Any) -> torch.Tensor:
        """The router's own parameter."""
        return self.get_base_layer().get_parameter(key)

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The router's decision with the copies in place of its parameters.

        Args:
            *args: For the router.
            adapter_names (`list[str]`, *optional*): Not possible here.
            **kwargs: For the router.

        Returns:
            As the router.
        """
        working = self.working_adapters(adapter_names)
        if not working:
            return self.base_layer(*args, **kwargs)
        # torch's own way to run a module with other tensors in its parameters' places, also when it is compiled
        return torch.func.functional_call(self.base_layer, self.in_place_of(working), args, kwargs)


def bypass_slices(model: nn.Module) -> AbstractContextManager[None]:
    """The base model while the block runs; see [`~hf_moe.adapters.core.bypass`].

    Args:
        model (`nn.Module`): A model with expert slices.
    """
    return bypass(model, SliceLayer)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, is_transposed: bool) -> torch.Tensor:
    return F.linear(x, weight.T if is_transposed else weight, bias)
