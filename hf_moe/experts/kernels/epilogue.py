"""What happens between the two projections, computed in buffers the caller owns.

The activations whose derivative torch offers as one kernel are computed in place, pass by pass while the rows are in
cache; any other gating is called as it is, and differentiated by autograd for the rows of one expert at a time.

Shapes: R rows of one expert, I intermediate, W = 2I for gated experts and I for plain ones.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import activations


__all__ = [
    "CallableEpilogue",
    "CompiledSiluGate",
    "Epilogue",
    "GatedEpilogue",
    "UnaryEpilogue",
    "callable_epilogue",
    "compiled_epilogue",
    "known_epilogue",
]

aten = torch.ops.aten


class _Activation(NamedTuple):
    forward: Callable[..., torch.Tensor]  # (x, out=) -> out
    backward: Callable[..., torch.Tensor]  # (grad, x, grad_input=) -> grad_input


def _gelu(approximate: str) -> _Activation:
    return _Activation(
        lambda x, out: aten.gelu.out(x, approximate=approximate, out=out),
        lambda grad, x, grad_input: aten.gelu_backward.grad_input(
            grad, x, approximate=approximate, grad_input=grad_input
        ),
    )


_SILU = _Activation(aten.silu.out, aten.silu_backward.grad_input)
_RELU = _Activation(
    lambda x, out: torch.clamp_min(x, 0, out=out),
    lambda grad, x, grad_input: aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad_input),
)
_GELU = _gelu("none")
_GELU_TANH = _gelu("tanh")


def _activation(function: Any) -> _Activation | None:
    if isinstance(function, (nn.SiLU, activations.SiLUActivation)) or function is nn.functional.silu:
        return _SILU
    if isinstance(function, nn.ReLU) or function is nn.functional.relu:
        return _RELU
    if isinstance(function, nn.GELU):
        return _GELU if function.approximate == "none" else _GELU_TANH
    if isinstance(function, activations.GELUActivation) and function.act is nn.functional.gelu:
        return _GELU
    return None


class Epilogue:
    """Interface of the step between the projections. Rows are changed in place where that saves memory."""

    def forward(self, projected: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Activation of the rows.

        Args:
            projected (`torch.Tensor` of shape `(R, W)`): First projection; is not changed.
            out (`torch.Tensor` of shape `(R, I)`): Where the result goes.

        Returns:
            `out`.
        """
        raise TypeError(f"{type(self).__name__} must implement `forward`.")

    def backward(self, projected: torch.Tensor, grad: torch.Tensor, scratch: torch.Tensor) -> None:
        """Turns the first projection into its gradient.

        Args:
            projected (`torch.Tensor` of shape `(R, W)`): First projection; its gradient takes its place.
            grad (`torch.Tensor` of shape `(R, I)`): Gradient of the activation; is used up.
            scratch (`torch.Tensor` of shape `(R, I)`): Memory to use.
        """
        raise TypeError(f"{type(self).__name__} must implement `backward`.")


class GatedEpilogue(Epilogue):
    """act(g) * u, the halves side by side: Llama's, Mixtral's, Qwen's SwiGLU."""

    def __init__(self, activation: _Activation):
        self.activation = activation

    def forward(self, projected: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        gate, up = projected.chunk(2, dim=-1)
        return self.activation.forward(gate, out=out).mul_(up)

    def backward(self, projected: torch.Tensor, grad: torch.Tensor, scratch: torch.Tensor) -> None:
        gate, up = projected.chunk(2, dim=-1)
        grad_up = self.activation.forward(gate, out=scratch).mul_(grad)  # du = act(g) da
        self.activation.backward(grad.mul_(up), gate, grad_input=gate)  # dg = act'(g) u da
        up.copy_(grad_up)


class CompiledSiluGate(Epilogue):
    """silu(g) * u by the compiled operators: one pass over the rows each way."""

    def forward(self, projected: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        torch.ops.hf_moe_compiled.silu_gate(projected, out)
        return out

    def backward(self, projected: torch.Tensor, grad: torch.Tensor, scratch: torch.Tensor) -> None:
        torch.ops.hf_moe_compiled.silu_gate_backward(projected, grad)


class UnaryEpilogue(Epilogue):
    """act(u): experts without a gate, as in GPT-2."""

    def __init__(self, activation: _Activation):
        self.activation = activation

    def forward(self, projected: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return self.activation.forward(projected, out=out)

    def backward(self, projected: torch.Tensor, grad: torch.Tensor, scratch: torch.Tensor) -> None:
        self.activation.backward(grad, projected, grad_input=projected)


class CallableEpilogue(Epilogue):
    """Any function of the rows: clamped, interleaved or otherwise special gates (gpt-oss, DeepSeek V4, ...)."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        self.function = function

    def forward(self, projected: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(self.function(projected))

    def backward(self, projected: torch.Tensor, grad: torch.Tensor, scratch: torch.Tensor) -> None:
        with torch.enable_grad():
            rows = projected.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.function(rows), rows, grad)
        projected.copy_(gradient)


_KNOWN = {
    (id(activation), gated): (GatedEpilogue if gated else UnaryEpilogue)(activation)
    for activation in (_SILU, _RELU, _GELU, _GELU_TANH)
    for gated in (False, True)
}
_COMPILED_SILU_GATE = CompiledSiluGate()


def known_epilogue(function: Any, gated: bool) -> Epilogue | None:
    """The in-place epilogue of an activation function, or `None` if it has none.

    Args:
        function (`Callable`): Activation, as in `experts.act_fn`.
        gated (`bool`): Whether it multiplies a second half.
    """
    activation = _activation(function)
    return None if activation is None else _KNOWN[id(activation), gated]


def compiled_epilogue(epilogue: Epilogue, dtype: torch.dtype) -> Epilogue:
    """The same by the compiled operators, which must be loaded, where they have it; else the epilogue itself."""
    is_silu_gate = epilogue is _KNOWN[id(_SILU), True]
    if is_silu_gate and torch.ops.hf_moe_compiled.has_products(dtype):
        return _COMPILED_SILU_GATE
    return epilogue


def callable_epilogue(function: Callable[[torch.Tensor], torch.Tensor]) -> Epilogue:
    """The epilogue that calls `function((R, W)) -> (R, I)`, which must not depend on other tensors with gradients."""
    return CallableEpilogue(function)
