"""Ways to train one expert of stacked weights, for comparison with the adapter that does."""

import torch
from torch.nn.utils import parametrize

from hf_moe.adapters.expert_slice.layer import bank_parameters, router_parameters
from hf_moe.views import moe_layers


LAYER, EXPERT = 3, 2


def batch(rows=2, length=9, seed=0, vocabulary=384):
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model, seed=0):
    return model(input_ids=batch(seed=seed), use_cache=False)[0].float().square().mean()


def view_of(model, layer=LAYER):
    return next(view for view in moe_layers(model) if f".{layer}." in view.name)


class Masked:
    """The whole bank trains, with gradients of other experts zeroed."""

    def __init__(self, model):
        model.requires_grad_(False)
        view = view_of(model)
        self.parameters = [*bank_parameters(view.experts).values(), *router_parameters(view.router).values()]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        for parameter in bank_parameters(view.experts).values():
            keep = torch.zeros(parameter.shape[0], *[1] * (parameter.dim() - 1))
            keep[EXPERT] = 1
            parameter.register_hook(lambda gradient, keep=keep: gradient * keep)


class _Splice(torch.nn.Module):
    def __init__(self, bank):
        super().__init__()
        self.slice = torch.nn.Parameter(bank[EXPERT : EXPERT + 1].detach().clone())

    def forward(self, bank):
        return bank.index_copy(0, torch.tensor([EXPERT]), self.slice)


class Spliced:
    """A small trainable slice is copied into the frozen bank in every forward pass."""

    def __init__(self, model):
        model.requires_grad_(False)
        view = view_of(model)
        self.parameters = list(router_parameters(view.router).values())
        for name, parameter in bank_parameters(view.experts).items():
            splice = _Splice(parameter)
            parametrize.register_parametrization(view.experts, name, splice)
            self.parameters.append(splice.slice)
        for parameter in self.parameters:
            parameter.requires_grad_(True)


def trained(model, parameters, optimizer, steps=3, **options):
    """Trains, and returns the optimizer."""
    optimizer = optimizer(parameters, lr=1e-3 if optimizer is torch.optim.AdamW else 0.05, **options)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, seed=step).backward()
        optimizer.step()
    return optimizer


def weights(model):
    """Bank and router of the layer, as tensors by name."""
    view = view_of(model)
    found = {f"bank.{name}": getattr(view.experts, name).detach().clone() for name in bank_parameters(view.experts)}
    return found | {f"router.{name}": p.detach().clone() for name, p in router_parameters(view.router).items()}
