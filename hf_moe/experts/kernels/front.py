"""The experts functions that are registered: one that chooses, and one per path.

Shapes: T tokens, K slots per token, N experts, D hidden.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from .bank import ExpertBank, read_bank
from .buckets import generates_kernels
from .compiled import compiled_dtypes, load_compiled
from .composed import composed_experts
from .decode import decode_experts
from .fused import fused_experts
from .selection import DEFAULT_TABLE, load_table


__all__ = ["IMPLEMENTATIONS", "choose_path", "hf_moe_experts_forward"]

# Below this share of slots in use, a kernel that skips the empty ones is worth more than any other difference.
_MOSTLY_USED = 0.75

# Up to here all rows go through the compiled operator at once; above, pieces that stay in cache are faster.
_FEW_SLOTS = 1024


def hf_moe_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """`experts_implementation="hf_moe"`: the same numbers as any other implementation, by the path that is fastest
    for this call.

    Args:
        self (`torch.nn.Module`): An experts module decorated with `use_experts_implementation`.
        hidden_states (`torch.Tensor` of shape `(T, D)`): Tokens.
        top_k_index (`torch.Tensor` of shape `(T, K)`): Experts; N and above marks an empty slot.
        top_k_weights (`torch.Tensor` of shape `(T, K)`): Weights.

    Returns:
        `torch.Tensor` of shape `(T, D)`.

    Example:
        ```python
        import hf_moe
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained("allenai/OLMoE-1B-7B-0924", experts_implementation="hf_moe")
        ```
    """
    return _run(None, self, hidden_states, top_k_index, top_k_weights)


def choose_path(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> str:
    """The path `"hf_moe"` takes for a call outside graph capture, without running it.

    Args:
        experts (`torch.nn.Module`): An experts module decorated with `use_experts_implementation`.
        hidden_states (`torch.Tensor` of shape `(T, D)`): Tokens.
        top_k_index (`torch.Tensor` of shape `(T, K)`): Experts.
        top_k_weights (`torch.Tensor` of shape `(T, K)`): Weights.

    Returns:
        `str`: One of `PATHS` in `selection.py`, or `"composed"`.
    """
    if not _is_ours(experts, hidden_states):
        return "grouped_mm"
    return _choose(read_bank(experts), experts, hidden_states, top_k_index, top_k_weights)


def _is_ours(experts: Any, hidden_states: torch.Tensor) -> bool:
    # Off the CPU, and for quantised, sharded or otherwise special parameters, transformers knows better.
    if hidden_states.device.type != "cpu":
        return False
    return read_bank(experts).is_plain


def _run(
    path: str | None,
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    if hidden_states.device.type != "cpu":
        return grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    dtype = hidden_states.dtype
    if torch.compiler.is_compiling():
        up = "gate_up_proj" if experts.has_gate else "up_proj"
        biases = (getattr(experts, f"{up}_bias"), experts.down_proj_bias) if experts.has_bias else (None, None)
        parameters = (getattr(experts, up), biases[0], experts.down_proj, biases[1])
        return _composed(experts, parameters, hidden_states, top_k_index, top_k_weights).to(dtype)
    bank = read_bank(experts)
    if not bank.is_plain:
        return grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    if path is None:
        path = _choose(bank, experts, hidden_states, top_k_index, top_k_weights)
    if bank.epilogue is None or path == "composed":
        return _composed(experts, bank.parameters, hidden_states, top_k_index, top_k_weights).to(dtype)
    if path == "grouped_mm":
        return grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    if torch.is_autocast_enabled("cpu"):
        hidden_states, up, up_bias, down, down_bias = _autocast(hidden_states, *bank.parameters)
        bank = bank._replace(up=up, up_bias=up_bias, down=down, down_bias=down_bias)
        with torch.autocast("cpu", enabled=False):
            return _call(path, bank, hidden_states, top_k_index, top_k_weights).to(dtype)
    return _call(path, bank, hidden_states.to(bank.up.dtype), top_k_index, top_k_weights).to(dtype)


def _call(
    path: str, bank: ExpertBank, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    compiled = path == "compiled" and bank.up.dtype in compiled_dtypes
    if compiled:
        load_compiled(build=True)
    few = path == "decode" or top_k_index.numel() <= _FEW_SLOTS
    if path in ("decode", "compiled") and few and not _needs_grad(bank, hidden_states, top_k_weights):
        return decode_experts(bank, hidden_states, top_k_index, top_k_weights, compiled=compiled)
    bucketed = path == "bucketed" and generates_kernels(bank.up.dtype)
    return fused_experts(bank, hidden_states, top_k_index, top_k_weights, bucketed=bucketed, compiled=compiled)


def _choose(
    bank: ExpertBank,
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> str:
    if bank.epilogue is None:
        return "composed"
    training = _needs_grad(bank, hidden_states, top_k_weights)
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast and bank.up.dtype != torch.float64 else bank.up.dtype
    slots = top_k_index.numel()
    may_be_empty = experts._is_expert_parallel
    used = int((top_k_index < bank.num_experts).sum()) if may_be_empty else slots
    rows = used / max(1, min(bank.num_experts, used))
    path = load_table().choose(dtype, training, rows)
    if path == "compiled" and (dtype not in compiled_dtypes or bank.is_transposed or not load_compiled()):
        path = DEFAULT_TABLE.choose(dtype, training, rows)
    if path == "grouped_mm" and (autocast or used < _MOSTLY_USED * slots or not _fits_grouped_mm(bank, hidden_states)):
        path = "bucketed" if generates_kernels(dtype) else "exact"
    return path


def _needs_grad(bank: ExpertBank, *inputs: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (*inputs, *bank.parameters))


def _fits_grouped_mm(bank: ExpertBank, hidden_states: torch.Tensor) -> bool:
    # torch's grouped_mm has no float64 and wants strides of whole 16 bytes.
    size = bank.up.dtype.itemsize
    widths = (*bank.up.shape[1:], *bank.down.shape[1:])
    return size <= 4 and hidden_states.shape[0] > 0 and all(width * size % 16 == 0 for width in widths)


def _autocast(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """What autocast does to the inputs of a matrix product."""
    dtype = torch.get_autocast_dtype("cpu")
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _composed(
    experts: Any,
    parameters: tuple[Any, ...],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    if torch.is_autocast_enabled("cpu"):
        hidden_states, *cast = _autocast(hidden_states, *parameters)
        parameters = tuple(cast)
    else:
        hidden_states = hidden_states.to(parameters[0].dtype)
    return composed_experts(experts, parameters, hidden_states, top_k_index, top_k_weights)


def _named(path: str, name: str) -> Callable[..., torch.Tensor]:
    def forward(
        self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return _run(path, self, hidden_states, top_k_index, top_k_weights)

    forward.__name__ = forward.__qualname__ = f"{name}_experts_forward"
    forward.__doc__ = f'`experts_implementation="{name}"`: always the path `{path}`, where it can run.'
    return forward


#: Name for `experts_implementation` -> function.
IMPLEMENTATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "hf_moe": hf_moe_experts_forward,
    **{f"hf_moe_{path}": _named(path, f"hf_moe_{path}") for path in ("bucketed", "compiled", "decode", "exact")},
    "hf_moe_composed": _named("composed", "hf_moe_composed"),
}

for _name, _function in IMPLEMENTATIONS.items():
    ALL_EXPERTS_FUNCTIONS.register(_name, _function)
