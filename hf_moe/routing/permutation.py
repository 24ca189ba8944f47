"""Permutation local search: learns which expert listens to which output of a gate, then keeps the answer.

Shapes: T tokens, N experts (all, zero-computation ones included), J trees of a gate, P permutations (J or 1).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import initialization as init
from transformers.utils import logging

from .schedules import ExponentialSchedule, LinearSchedule, resolve_steps


__all__ = [
    "PermutationLocalSearch",
    "PermutationOptions",
    "advance_permutation_search",
    "harden_permutations",
    "parse_permutation_search",
    "sinkhorn",
]

logger = logging.get_logger(__name__)

#: Log-weights start within this distance of 0.
START = 0.05
#: Entries of a soft permutation below this are 0: their experts are left out and cost nothing.
NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class PermutationOptions:
    """What `router_config["permutation_search"]` says.

    Args:
        num_steps (`int` or `float`): Optimizer steps of the search, or a fraction of the run in (0, 1]. The paper's is
            one to ten epochs.
        entropy_coef (`float`, defaults to 1e-4): Weight of the entropy of P, and of P with normalised rows.
        per_tree (`bool`, defaults to `False`): One permutation for each tree of `comet` or selector of `dselect_k`.
        tau_start, tau_end (`float`, defaults to 1e-3 and 1e-7): Temperature; its logarithm falls linearly.
        sweeps_start, sweeps_end (`int`, defaults to 20 and 150): Sinkhorn sweeps, growing linearly.
        learning_rate_scale (`float`, defaults to 1.0): Learning rate of A relative to that of other parameters, for
            optimizers like Adam. Entries of A start within 0.05 of each other, and the paper's rates are 5e-5 to 1e-3:
            at much higher ones every step draws another permutation.
    """

    num_steps: int | float
    entropy_coef: float = 1e-4
    per_tree: bool = False
    tau_start: float = 1e-3
    tau_end: float = 1e-7
    sweeps_start: int = 20
    sweeps_end: int = 150
    learning_rate_scale: float = 1.0

    def __post_init__(self):
        if not (_is_number(self.entropy_coef) and self.entropy_coef >= 0):
            raise ValueError(f"`entropy_coef` must be at least 0 and finite, got {self.entropy_coef!r}.")
        if not isinstance(self.per_tree, bool):
            raise ValueError(f"`per_tree` must be True or False, got {self.per_tree!r}.")
        for name in ("tau_start", "tau_end", "learning_rate_scale"):
            value = getattr(self, name)
            if not (_is_number(value) and value > 0):
                raise ValueError(f"`{name}` must be above 0 and finite, got {value!r}.")
        for name in ("sweeps_start", "sweeps_end"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
        _ = self.tau, self.sweeps  # they check `num_steps`: a search has to end

    @property
    def tau(self) -> ExponentialSchedule:
        """Temperature by step."""
        return ExponentialSchedule(self.tau_start, self.tau_end, self.num_steps)

    @property
    def sweeps(self) -> LinearSchedule:
        """Sinkhorn sweeps by step, to be rounded."""
        return LinearSchedule(self.sweeps_start, self.sweeps_end, self.num_steps)


def parse_permutation_search(description: Mapping[str, Any] | PermutationOptions) -> PermutationOptions:
    """Checks `router_config["permutation_search"]`.

    Args:
        description (`Mapping`): Fields of [`PermutationOptions`]; `num_steps` is required.

    Returns:
        [`PermutationOptions`]

    Raises:
        ValueError: a field is unknown or missing, or a value cannot work.
    """
    if isinstance(description, PermutationOptions):
        return description
    known = [field.name for field in dataclasses.fields(PermutationOptions)]
    if not isinstance(description, Mapping) or "num_steps" not in description or set(description) - set(known):
        raise ValueError(
            f"`router_config['permutation_search']` must be a dict of {known}, `num_steps` among them, got "
            f"{description!r}."
        )
    try:
        return PermutationOptions(**description)
    except ValueError as error:
        raise ValueError(f"`router_config['permutation_search']`: {error}") from error


def sinkhorn(log_weights: torch.Tensor, sweeps: int | torch.Tensor) -> torch.Tensor:
    """Normalises rows, then columns, `sweeps` times, in log space.

    Args:
        log_weights (`torch.Tensor` of shape `(..., N, N)`): A / tau, float32.
        sweeps (`int` or 0-dim `torch.Tensor`): How often.

    Returns:
        `torch.Tensor` of shape `(..., N, N)`: Columns sum to 1, rows nearly.

    Example:

    ```python
    >>> sinkhorn(torch.tensor([[3.0, 0.0], [0.0, 3.0]]), sweeps=5)
    tensor([[0.9526, 0.0474],
            [0.0474, 0.9526]])
    ```
    """
    for _ in range(int(sweeps)):
        log_weights = _sweep(log_weights)
    return log_weights.exp()


class PermutationLocalSearch(nn.Module):
    """A permutation of the experts behind any gate: soft and learned for some steps, then hard and fixed.

    [COMET](https://huggingface.co/papers/2306.02824), Sec. 4. With g the weights a gate gives, g'_l = sum_m g_m P_ml,
    P = Sinkhorn(A / tau) and A learned; temperature and sweeps follow a schedule. When the search ends, P becomes the
    assignment with the largest sum (found by scipy) and is from then on an index, as it always is at evaluation.
    Every router takes it, `router_config={"permutation_search": {"num_steps": 0.1}}`, and the trainers of hf_moe and
    `RouterScheduleCallback` drive it; layers count nothing. While the search runs, a token has N slots.

    Note: entries of P below 1e-6 are taken for 0, so that a search costs little more than training without it; the
    paper's code computes all experts.

    Args:
        num_experts (`int`): N.
        options ([`PermutationOptions`]): See there.
        num_permutations (`int`, defaults to 1): P.

    Example:

    ```python
    >>> search = PermutationLocalSearch(4, PermutationOptions(num_steps=100))
    >>> search.advance(step=0)
    >>> search.soft().shape
    torch.Size([1, 4, 4])
    ```
    """

    order: torch.Tensor  # (P, N): the output of the gate that expert l listens to
    tau: torch.Tensor
    sweeps: torch.Tensor
    finished: torch.Tensor

    def __init__(self, num_experts: int, options: PermutationOptions, num_permutations: int = 1):
        super().__init__()
        self.options = options
        #: Whether training uses the soft P. Another number of slots follows from it, so it is no tensor.
        self.searching = False
        self._advanced = False
        self.log_weights = nn.Parameter(torch.empty(num_permutations, num_experts, num_experts))
        self.register_buffer("order", torch.arange(num_experts).repeat(num_permutations, 1))
        self.register_buffer("tau", torch.tensor(options.tau_start))
        self.register_buffer("sweeps", torch.tensor(options.sweeps_start))
        self.register_buffer("finished", torch.tensor(False))
        self.reset_parameters()

    # -- what a schedule does --------------------------------------------------------------------------------------
    @torch.no_grad()
    def advance(self, step: int, max_steps: int | None = None) -> None:
        """Puts the search where it is after `step` optimizer steps; a finished one stays finished.

        Args:
            step (`int`): Finished optimizer steps.
            max_steps (`int`, *optional*): Steps of the run.

        Raises:
            ValueError: the search would outlast the run, or its parameter is frozen.
            ImportError: scipy is missing.
        """
        self._advanced = True
        if self.finished:
            self.searching = False
            return
        _assignment_solver()  # now rather than when the search is over
        num_steps = resolve_steps(self.options.num_steps, max_steps)
        if max_steps is not None and 0 < max_steps < num_steps:
            raise ValueError(
                f"`router_config['permutation_search']` takes {num_steps} steps, but the run has {max_steps}: it "
                "would never end. Give `num_steps` as a fraction of the run, or train for longer."
            )
        if not self.log_weights.requires_grad:
            raise ValueError(
                "`router_config['permutation_search']` has nothing to learn: the router's parameters are frozen. "
                'Train them (PEFT: `modules_to_save=["gate"]`), or remove the option.'
            )
        self.tau.fill_(self.options.tau.value(step, max_steps))
        self.sweeps.fill_(round(self.options.sweeps.value(step, max_steps)))
        self.searching = step < num_steps
        if not self.searching:
            self.harden()
            self.finished.fill_(True)

    @torch.no_grad()
    def harden(self) -> None:
        """Writes the best assignment under the present P into `order`, which evaluation uses."""
        solve = _assignment_solver()
        soft = self.soft().double().cpu().numpy()
        # Experts are the rows here: for each the output of the gate that it listens to.
        best = [torch.as_tensor(solve(matrix.T, maximize=True)[1]) for matrix in soft]
        self.order.copy_(torch.stack(best))
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast(self.order, src=0)  # nearly equal sums may be ordered differently elsewhere

    # -- what a router does ----------------------------------------------------------------------------------------
    def soft(self) -> torch.Tensor:
        """P, `(P, N, N)`, float32: the share of the gate's output m that expert l gets."""
        scaled = self.options.learning_rate_scale * self.log_weights.float() / self.tau.float()
        if not torch.compiler.is_compiling():
            return sinkhorn(scaled, self.sweeps)
        for sweep in range(max(self.options.sweeps_start, self.options.sweeps_end)):  # a static graph
            scaled = torch.where(sweep < self.sweeps, _sweep(scaled), scaled)
        return scaled.exp()

    def permute(self, weights: torch.Tensor, soft: torch.Tensor | None) -> torch.Tensor:
        """g' of g, with the same total weight for each token.

        Args:
            weights (`torch.Tensor` of shape `(T, J, N)`): g, tree by tree where the gate has trees.
            soft (`torch.Tensor` of shape `(P, N, N)`, *optional*): P; the hard one by default.

        Returns:
            `torch.Tensor` of shape `(T, J, N)`.
        """
        if soft is None:
            permuted = weights.gather(-1, self.order.expand(weights.shape))
            if not self.training:
                return permuted
            if not self._advanced and not torch.compiler.is_compiling():
                logger.warning_once(
                    "A model with `router_config['permutation_search']` is trained, but nobody drives the search. Use "
                    "a trainer of hf_moe, add `RouterScheduleCallback()`, or call `advance_permutation_search`."
                )
            # Data parallelism expects a gradient of everything that had one when it started.
            return permuted + 0.0 * self.log_weights.sum()
        kept = torch.where(soft < NEGLIGIBLE, 0.0, soft).expand(weights.shape[-2], -1, -1)
        permuted = torch.einsum("tjm,jml->tjl", weights, kept)
        total = weights.sum(dim=(-2, -1), keepdim=True)
        return permuted * (total / permuted.sum(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny))

    def permute_slots(
        self, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, soft: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """g' of a decision given as slots.

        Args:
            top_k_index (`torch.Tensor` of shape `(T, K)`): Outputs of the gate; N is an empty slot.
            top_k_weights (`torch.Tensor` of shape `(T, K)`): Their weights.
            soft (`torch.Tensor` of shape `(1, N, N)`): P.

        Returns:
            `top_k_index, top_k_weights` of shape `(T, N)`, heaviest first.
        """
        num_experts = soft.shape[-1]
        columns = top_k_weights.new_zeros(top_k_index.shape[0], num_experts + 1)
        dense = columns.scatter_add(-1, top_k_index, top_k_weights)[:, :num_experts]
        weights, index = self.permute(dense.unsqueeze(-2), soft).squeeze(-2).sort(dim=-1, descending=True)
        return index.masked_fill(weights == 0, num_experts), weights

    def penalty(self, soft: torch.Tensor) -> torch.Tensor:
        """zeta (H(P) + H(P with normalised rows)), 0-dim: 0 for a permutation.

        Args:
            soft (`torch.Tensor` of shape `(P, N, N)`): P.
        """
        rows = soft / soft.sum(dim=-1, keepdim=True).clamp_min(NEGLIGIBLE)
        both = torch.stack([soft, rows])
        return -self.options.entropy_coef * (both * torch.log(both + NEGLIGIBLE)).sum()

    def reset_parameters(self) -> None:
        """Initial values, through `transformers.initialization` so that loaded values are kept."""
        bound = START / self.options.learning_rate_scale
        init.uniform_(self.log_weights, -bound, bound)
        init.copy_(self.order, torch.arange(self.order.shape[-1], device=self.order.device).expand_as(self.order))
        init.constant_(self.tau, self.options.tau_start)
        init.constant_(self.sweeps, self.options.sweeps_start)
        init.constant_(self.finished, False)


def advance_permutation_search(model: nn.Module, step: int, max_steps: int | None = None) -> None:
    """Puts every permutation search of a model where it is after `step` steps; for loops without a Trainer, call it
    before every step and [`harden_permutations`] before an evaluation.

    Args:
        model (`nn.Module`): A model without such a search is left alone.
        step (`int`): Finished optimizer steps.
        max_steps (`int`, *optional*): Steps of the whole run; needed where `num_steps` is a fraction.

    Raises:
        ValueError: see [`PermutationLocalSearch.advance`].
    """
    for search in _searches(model):
        search.advance(step, max_steps)


def harden_permutations(model: nn.Module, step: int | None = None, max_steps: int | None = None) -> None:
    """Has evaluation use the best assignments found so far, where a search still runs.

    Args:
        model (`nn.Module`): A model without such a search is left alone.
        step (`int`, *optional*): Finished optimizer steps, where training is over: a search of that many is, too.
        max_steps (`int`, *optional*): Steps of the whole run.
    """
    for search in _searches(model):
        if step is not None:
            search.advance(step, max_steps)
        if search.searching:
            search.harden()


def _searches(model: nn.Module) -> list[PermutationLocalSearch]:
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, PermutationLocalSearch) and ".original_module." not in f".{name}."
    ]


def _sweep(log_weights: torch.Tensor) -> torch.Tensor:
    log_weights = log_weights - log_weights.logsumexp(dim=-1, keepdim=True)
    return log_weights - log_weights.logsumexp(dim=-2, keepdim=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _assignment_solver() -> Callable:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError(
            "`router_config['permutation_search']` needs scipy to train. Run `pip install scipy` (or install "
            "`hf-moe[statistics]`)."
        ) from error
    return linear_sum_assignment
