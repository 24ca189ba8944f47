"""Banks of every layout, and the reference: the module's own eager loop."""

import copy
from types import SimpleNamespace

import torch
from torch import nn
from transformers.integrations.moe import use_experts_implementation


TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, SLOTS = 13, 16, 24, 5, 2


class Bank(nn.Module):
    """A bank of any layout, with the plainest possible eager loop."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = EXPERTS
        transposed, width = self.transposed, (2 if self.gated else 1) * INTERMEDIATE
        name = "gate_up_proj" if self.gated else "up_proj"
        up = (HIDDEN, width) if transposed else (width, HIDDEN)
        down = (INTERMEDIATE, HIDDEN) if transposed else (HIDDEN, INTERMEDIATE)
        setattr(self, name, nn.Parameter(torch.empty(EXPERTS, *up)))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, *down))
        if self.biased:
            setattr(self, f"{name}_bias", nn.Parameter(torch.empty(EXPERTS, width)))
            self.down_proj_bias = nn.Parameter(torch.empty(EXPERTS, HIDDEN))
        if self.normed:
            self.post_expert_norm = nn.RMSNorm(HIDDEN, eps=1e-6)
        self.act_fn = config.act_fn

    def forward(self, hidden_states, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden_states)
        name = "gate_up_proj" if self.gated else "up_proj"
        for e in range(self.num_experts):
            token, slot = torch.where(top_k_index == e)
            up, down = getattr(self, name)[e], self.down_proj[e]
            up, down = (up, down) if self.transposed else (up.t(), down.t())
            rows = hidden_states[token] @ up
            if self.biased:
                rows = rows + getattr(self, f"{name}_bias")[e]
            rows = self._apply_gate(rows) if self.gated else self.act_fn(rows)
            rows = rows @ down
            if self.biased:
                rows = rows + self.down_proj_bias[e]
            if self.normed:
                rows = self.post_expert_norm(rows)
            output = output.index_add(0, token, (rows * top_k_weights[token, slot, None]).to(output.dtype))
        return output


def clamped_interleaved_gate(self, rows):
    gate, up = rows[..., ::2].clamp(max=1.0), rows[..., 1::2].clamp(-1.0, 1.0)
    return (up + 1) * gate * torch.sigmoid(1.7 * gate)


def _layout(gated=True, biased=False, transposed=False, concatenated=True, normed=False, act_fn=None, gate=None):
    flags = dict(has_gate=gated, has_bias=biased, is_transposed=transposed, is_concatenated=concatenated)
    attributes = dict(gated=gated, biased=biased, transposed=transposed, normed=normed)
    if gate is not None:
        attributes["_apply_gate"] = gate
    cls = type("Experts", (Bank,), {**attributes, "__init__": Bank.__init__, "forward": Bank.forward})
    return use_experts_implementation(cls, has_post_expert_norm=normed, **flags), act_fn or nn.SiLU()


LAYOUTS = {
    "plain": lambda: _layout(),
    "gelu": lambda: _layout(act_fn=nn.GELU()),
    "gelu_tanh": lambda: _layout(act_fn=nn.GELU(approximate="tanh")),
    "relu_without_gate": lambda: _layout(gated=False, act_fn=nn.ReLU()),
    "unknown_activation": lambda: _layout(act_fn=nn.Mish()),
    "unknown_activation_without_gate": lambda: _layout(gated=False, act_fn=nn.Mish()),
    "activation_with_parameters": lambda: _layout(gated=False, act_fn=nn.PReLU()),
    "biased": lambda: _layout(biased=True),
    "biased_without_gate": lambda: _layout(gated=False, biased=True),
    "transposed": lambda: _layout(transposed=True),
    "interleaved": lambda: _layout(
        biased=True, transposed=True, concatenated=False, gate=clamped_interleaved_gate
    ),
    "own_gate": lambda: _layout(gate=lambda self, rows: rows.chunk(2, dim=-1)[0].tanh() * rows.chunk(2, dim=-1)[1]),
    "normed": lambda: _layout(normed=True),
}  # fmt: skip
PATHS = ("hf_moe", "hf_moe_bucketed", "hf_moe_composed", "hf_moe_decode", "hf_moe_exact")


def make_bank(layout="plain", dtype=torch.float64, implementation="eager"):
    """A bank with seeded values; a small config of its own carries the implementation."""
    cls, act_fn = LAYOUTS[layout]()
    bank = cls(SimpleNamespace(act_fn=act_fn, _experts_implementation=implementation))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return bank.to(dtype)


def with_implementation(bank, implementation):
    """A copy of the bank that runs another implementation."""
    other = copy.deepcopy(bank)
    other.config._experts_implementation = implementation
    return other


def make_inputs(tokens=TOKENS, slots=SLOTS, dtype=torch.float64, seed=1, index=None):
    """`(hidden_states, top_k_index, top_k_weights)`."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, EXPERTS, generator=generator)
    weights, chosen = logits.softmax(-1).topk(slots, dim=-1)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    return hidden, chosen if index is None else index, weights.to(dtype)


def run(bank, hidden, index, weights, seed=2):
    """Output and gradients by name, of a random linear function of the output."""
    hidden, weights = hidden.detach().clone().requires_grad_(), weights.detach().clone().requires_grad_()
    bank.zero_grad(set_to_none=True)
    output = bank(hidden, index, weights)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(output.dtype)
    if output.requires_grad:
        output.backward(direction)
    results = {"output": output.detach(), "hidden": hidden.grad, "weights": weights.grad}
    results.update({name: parameter.grad for name, parameter in bank.named_parameters()})
    return {name: torch.zeros(()) if value is None else value for name, value in results.items()}


def assert_same(results, expected, **tolerances):
    """Every output and gradient within the tolerances."""
    assert results.keys() == expected.keys()
    for name, value in results.items():
        torch.testing.assert_close(
            value, expected[name].to(value.dtype).expand_as(value), msg=lambda m, n=name: f"{n}: {m}", **tolerances
        )
