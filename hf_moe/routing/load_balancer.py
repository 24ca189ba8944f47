r"""The load balancer: balance losses whose expert frequencies cover a whole optimizer step.

Shapes: T tokens, L MoE layers, N experts (of the widest layer in buffers), K per token, G micro-batches per optimizer
step, W ranks with different data.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from transformers.utils import logging

from hf_moe.layer_config import layer_config

from .balance import (
    balance_value,
    count_tokens,
    expert_counts,
    masked_mean,
    mean_probability,
    normalize_counts,
    router_z_loss,
)
from .layer_routing import LayerRouting
from .loss_scale import balance_loss_scale


__all__ = [
    "BALANCE_MODES",
    "BalanceLosses",
    "LayerRouting",
    "LoadBalancer",
    "PendingBalance",
    "validate_balance_options",
]

logger = logging.get_logger(__name__)

BALANCE_MODES = ("micro", "rank", "running", "lagged", "blend")


class BalanceLosses(NamedTuple):
    """Router losses of one forward. Add `scale * (coefficient * value)` of each to the model's loss, and
    `scale * penalty`, which has its coefficient in it.

    Args:
        aux_loss (`torch.Tensor`): Mean over layers of the load-balance loss; the value to log.
        z_loss (`torch.Tensor`, *optional*): Mean over layers of the router z-loss.
        scale (`torch.Tensor`): What makes the sum over micro-batches and ranks one loss; see [`LoadBalancer`].
        penalty (`torch.Tensor`, *optional*): Mean over layers of what the routers themselves add.
    """

    aux_loss: torch.Tensor
    z_loss: torch.Tensor | None
    scale: torch.Tensor
    penalty: torch.Tensor | None = None

    def total(self, aux_coefficient: float = 0.0, z_coefficient: float = 0.0) -> torch.Tensor:
        """`scale * (aux_coefficient * aux_loss + z_coefficient * z_loss + penalty)`: what to add to the loss."""
        total = aux_coefficient * self.aux_loss
        if z_coefficient and self.z_loss is not None:
            total = total + z_coefficient * self.z_loss
        if self.penalty is not None:
            total = total + self.penalty
        return self.scale * total


class LoadBalancer(nn.Module):
    r"""Load-balance loss with expert frequencies of the whole optimizer step: all micro-batches, all ranks.

    [Demons in the Detail: On Implementing Load Balancing Loss](https://huggingface.co/papers/2501.11873). With T the
    tokens of the step, the loss of a layer is

        L = N sum_i f_i P_i,   f_i = 1/(K T) sum_t 1[i in S_t],   P_i = 1/T sum_t p_ti.

    f has no gradient, so L = sum_{g,r} (T_gr / T) l_gr with l_gr = N sum_i f_i P_i^gr: micro-batch g of rank r needs
    its own mean probability P^gr and the f of everybody. Only f is communicated: one vector of counts per layer. But
    f is known after the last micro-batch only, so each mode takes for it what is known when l_gr is computed:

    | `mode` | f of micro-batch g | collectives per step |
    |---|---|---|
    | `micro` | this micro-batch (the classic loss) | 0 |
    | `rank` | this rank's micro-batches so far | 0 |
    | `running` | all ranks' micro-batches so far: exact at the last (the paper's buffer) | G |
    | `lagged` | the previous step, all ranks | 1, overlapped with the optimizer |
    | `blend` | so far + (G - g)/G of the previous step | G |

    `micro` forces every sequence to use all experts. The others only ask the corpus to be balanced and let experts
    specialise. `running` suits mixed data; `lagged` and `blend` suit large G with data that are *not* sorted by
    domain over time. The first step of a run has no previous one: `lagged` is then `rank`, `blend` is `running`.

    The loss is meant to be summed with `scale`, the share of this micro-batch; its derivation is in
    [`~hf_moe.routing.loss_scale.balance_loss_scale`]. It makes the coefficient independent of G and W, under the
    stock Trainer too.

    Gradients reach the router through P only. Buffers are touched only in training with gradients enabled;
    evaluation uses the statistics of its own batch.

    Note: steps must be announced (`begin_step`, `end_step`), which `GlobalBalanceCallback` does under a Trainer and
    `BalanceSteps` in a plain loop. A model trained without them computes `micro` whatever the mode, and says so.

    Args:
        num_experts (`Sequence[int]`): Experts of each MoE layer; layers may differ.
        mode (`str`, defaults to `"micro"`): See the table.
        local_fraction (`float`, defaults to 0.0): Weight of an extra term with the frequencies of this micro-batch,
            relative to the global one. The paper keeps 0.01 of it to regain throughput.
        z_loss (`bool`, defaults to `False`): Also compute the router z-loss.
        bias_update_speed (`float`, defaults to 0.0): Above 0, steps are counted in every mode, for
            [`~hf_moe.routing.selection_bias.update_selection_bias`].
        persistent (`bool`, defaults to `False`): Keep the counters in the state dict. Checkpoints of a Trainer do
            not need it, see `GlobalBalanceCallback`.

    Raises:
        ValueError: an argument is out of range.

    Example:

    ```python
    >>> balancer = LoadBalancer([8, 8], mode="running")
    >>> balancer.begin_step(num_micro_batches=4)
    >>> layers = [LayerRouting.from_router(r, o.router_logits, o.top_k_index) for r, o in zip(routers, outputs)]
    >>> losses = balancer(layers, token_mask, labels=labels, num_items_in_batch=num_items_in_batch)
    >>> loss = loss + losses.total(aux_coefficient=0.01)
    ```
    """

    #: True beside the decoder of an encoder-decoder model, whose tokens are the targets.
    counts_targets: bool = False
    #: Tokens a tower makes of an image; `None` beside layers that see text.
    tokens_per_image: int | None = None

    counts: torch.Tensor  # (L, N), of this step: all ranks in `running` and `blend`, else this rank
    previous_counts: torch.Tensor  # (L, N), of the step before
    num_tokens: torch.Tensor
    previous_num_tokens: torch.Tensor
    micro_batch: torch.Tensor  # g, micro-batches of this step so far
    num_micro_batches: torch.Tensor  # G
    step_num_tokens: torch.Tensor  # T, where it was announced

    def __init__(
        self,
        num_experts: Sequence[int],
        mode: str = "micro",
        local_fraction: float = 0.0,
        z_loss: bool = False,
        bias_update_speed: float = 0.0,
        persistent: bool = False,
    ):
        super().__init__()
        validate_balance_options(mode, local_fraction, bias_update_speed)
        self.num_experts = tuple(int(n) for n in num_experts)
        if not self.num_experts or min(self.num_experts) < 1:
            raise ValueError(
                f"`num_experts` must hold the number of experts of each MoE layer, at least one layer, "
                f"got {list(num_experts)}."
            )
        self.mode = mode
        self.local_fraction = local_fraction
        self.z_loss = z_loss
        self.bias_update_speed = bias_update_speed
        #: Ranks whose data differ, `None` for all: no tensor-parallel replicas, but context-parallel ranks.
        self.process_group: dist.ProcessGroup | None = None
        self._announced = False
        self._num_tokens_known = False
        self._summed_over_ranks = True
        self._reduction: tuple[Any, torch.Tensor] | None = None

        shape = (len(self.num_experts), max(self.num_experts))
        for name in ("counts", "previous_counts"):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int64), persistent=persistent)
        for name in ("num_tokens", "previous_num_tokens", "micro_batch", "num_micro_batches", "step_num_tokens"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64), persistent=persistent)

    @classmethod
    def from_config(cls, config: Any, num_experts: Sequence[int] | None = None) -> "LoadBalancer":
        """A balancer as a model config with the fields of `MoeConfigMixin` describes it.

        Args:
            config: Has `balance_mode`, `balance_local_fraction`, `router_z_loss_coef`, `router_bias_update_speed`.
            num_experts (`Sequence[int]`, *optional*): Experts of each MoE layer; by default
                `num_routing_targets` of each of `config.moe_layer_indices`.
        """
        if num_experts is None:
            layers = config.moe_layer_indices
            num_experts = [layer_config(config, layer).num_routing_targets for layer in layers]
        return cls(
            num_experts,
            mode=config.balance_mode,
            local_fraction=config.balance_local_fraction,
            z_loss=config.router_z_loss_coef != 0,
            bias_update_speed=config.router_bias_update_speed,
        )

    def reset_parameters(self) -> None:
        """Zero all counters; for `_init_weights`, because `from_pretrained` leaves non-persistent buffers unset."""
        for buffer in self.buffers(recurse=False):
            if not getattr(buffer, "_is_hf_initialized", False):
                buffer.zero_()

    # -- steps ---------------------------------------------------------------------------------------------------
    @property
    def world_size(self) -> int:
        """W, the ranks of `process_group`."""
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self.process_group)

    @property
    def counts_steps(self) -> bool:
        """Whether this balancer needs to know about steps at all."""
        return self.mode != "micro" or self.bias_update_speed > 0

    @property
    def is_recording(self) -> bool:
        """Whether a forward now would touch the buffers."""
        return self.counts_steps and self._announced and self.training and torch.is_grad_enabled()

    def begin_step(
        self,
        num_micro_batches: int = 1,
        num_tokens: int | torch.Tensor | None = None,
        summed_over_ranks: bool = True,
    ) -> None:
        """Start an optimizer step: counters of an aborted one are dropped.

        Args:
            num_micro_batches (`int`, defaults to 1): G of *this* step; the last step of an epoch may have fewer.
            num_tokens (`int` or `torch.Tensor`, *optional*): T of this step over all ranks, padding left out.
            summed_over_ranks (`bool`, defaults to `True`): Whether the loss, given `num_items_in_batch`, is summed
                over ranks (`TrainingArguments.average_tokens_across_devices`) rather than averaged.
        """
        self._announced = True
        for buffer in (self.counts, self.num_tokens, self.micro_batch):
            buffer.zero_()
        self._reduction = None
        self.set_accumulation(num_micro_batches, num_tokens, summed_over_ranks)

    def set_accumulation(
        self,
        num_micro_batches: int,
        num_tokens: int | torch.Tensor | None = None,
        summed_over_ranks: bool = True,
    ) -> None:
        """Set G, and T where it is known, of the current step; arguments as in [`~LoadBalancer.begin_step`].

        Raises:
            ValueError: `num_micro_batches` is below 1.
        """
        if num_micro_batches < 1:
            raise ValueError(f"`num_micro_batches` must be at least 1, got {num_micro_batches}.")
        self.num_micro_batches.fill_(num_micro_batches)
        self._num_tokens_known = num_tokens is not None
        self._summed_over_ranks = summed_over_ranks
        if num_tokens is not None:
            self.step_num_tokens.copy_(torch.as_tensor(num_tokens))

    def start_reduction(self) -> None:
        """Start the sum over ranks of modes that communicate once per step, after the last backward: the optimizer
        step hides it. Optional; `end_step` does it otherwise."""
        if self._reduction is None and self._reduces_at_end():
            payload = torch.cat([self.counts.flatten(), self.num_tokens.view(1)])
            self._reduction = (self._all_reduce(payload), payload)

    def end_step(self) -> torch.Tensor:
        """Close an optimizer step that was applied: its counts become the previous ones.

        Returns:
            `torch.Tensor` of shape `(L, N)`: `previous_counts`, summed over ranks in every mode that communicates or
            updates selection biases.
        """
        self.start_reduction()
        counts, num_tokens = self.counts, self.num_tokens
        if self._reduction is not None:
            work, payload = self._reduction
            if work is not None:
                work.wait()
            counts, num_tokens = payload[:-1].view_as(self.counts), payload[-1]
            self.counts.copy_(counts)  # between steps, every buffer is the same on every rank
            self.num_tokens.copy_(num_tokens)
            self._reduction = None
        # A step in which nothing was counted (loss computed elsewhere) says nothing about the data.
        seen = num_tokens > 0
        self.previous_counts.copy_(torch.where(seen, counts, self.previous_counts))
        self.previous_num_tokens.copy_(torch.where(seen, num_tokens, self.previous_num_tokens))
        return self.previous_counts

    def close(self) -> None:
        """Training is over: forwards no longer count, until the next `begin_step`."""
        self._announced = False
        self._num_tokens_known = False

    def _reduces_at_end(self) -> bool:
        if self.world_size == 1 or not self._announced:
            return False
        return self.mode == "lagged" or (self.mode in ("micro", "rank") and self.bias_update_speed > 0)

    def _all_reduce(self, payload: torch.Tensor) -> Any:
        # torch.compile turns the blocking call into a functional collective; it cannot trace a handle.
        asynchronous = not torch.compiler.is_compiling()
        return dist.all_reduce(payload, op=dist.ReduceOp.SUM, group=self.process_group, async_op=asynchronous)

    # -- losses --------------------------------------------------------------------------------------------------
    def forward(
        self,
        layers: Iterable[LayerRouting],
        token_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        labels_are_shifted: bool = False,
    ) -> BalanceLosses:
        """`begin` and `finish` in one call.

        Args:
            layers (`Iterable[LayerRouting]`): One per MoE layer, in order.
            token_mask (`torch.Tensor` of shape `(T,)` or `(B, S)`, *optional*): `False` on padding.
            labels, num_items_in_batch, labels_are_shifted: See [`PendingBalance.finish`].

        Returns:
            [`BalanceLosses`]
        """
        return self.begin(layers, token_mask).finish(labels, num_items_in_batch, labels_are_shifted)

    def begin(self, layers: Iterable[LayerRouting], token_mask: torch.Tensor | None = None) -> "PendingBalance":
        """Count, and start the sum over ranks, so that it runs while the language-model head does.

        Args:
            layers (`Iterable[LayerRouting]`): One per MoE layer, in order.
            token_mask (`torch.Tensor` of shape `(T,)` or `(B, S)`, *optional*): `False` on padding.

        Returns:
            [`PendingBalance`], whose `finish` gives the losses. Every `begin` needs its `finish`, on every rank.

        Raises:
            ValueError: number of layers, experts or mask entries are not what they should be.
        """
        layers = tuple(layers)
        self._check(layers)
        device = self.counts.device
        rows = []
        for layer, width in zip(layers, self.num_experts, strict=True):
            row = expert_counts(layer.index, width, token_mask).to(device)
            rows.append(nn.functional.pad(row, (0, self.counts.shape[1] - width)))
        counts = torch.stack(rows)  # (L, N)
        num_tokens = count_tokens(layers[0].index.shape[0], token_mask, device)
        if self.counts_steps and not self._announced and self.training and not torch.compiler.is_compiling():
            logger.warning_once(
                f"`balance_mode={self.mode!r}` and selection biases work on whole optimizer steps, and no step was "
                "announced: the balance loss uses micro-batch statistics. Add "
                "`hf_moe.routing.GlobalBalanceCallback()` to the Trainer, or use `hf_moe.routing.BalanceSteps` in a "
                "loop of your own."
            )
        work, payload = None, None
        if self.is_recording:
            payload = torch.cat([counts.flatten(), num_tokens.view(1)])
            if self.mode in ("running", "blend") and self.world_size > 1:
                work = self._all_reduce(payload)
        return PendingBalance(self, layers, token_mask, counts, num_tokens, payload, work)

    def _check(self, layers: tuple[LayerRouting, ...]) -> None:
        widths = tuple(layer.logits.shape[-1] for layer in layers)
        if widths != self.num_experts:
            raise ValueError(
                f"`layers` has the numbers of experts {list(widths)}, one per MoE layer, but this load balancer was "
                f"built for {list(self.num_experts)}. Pass the routing of every MoE layer, in order."
            )

    def _record(self, payload: torch.Tensor) -> None:
        self.counts.add_(payload[:-1].view_as(self.counts))
        self.num_tokens.add_(payload[-1])
        self.micro_batch.add_(1)

    def _frequency(self, micro_counts: torch.Tensor, recorded: bool) -> torch.Tensor:
        """f of the mode, `(L, N)`."""
        if not recorded or self.mode == "micro":
            return normalize_counts(micro_counts)
        if self.mode == "lagged":
            # The only micro-batch of the only rank is the step: its own counts are exact.
            own = (self.previous_num_tokens == 0) | (self.num_micro_batches * self.world_size == 1)
            return normalize_counts(torch.where(own, self.counts, self.previous_counts))
        if self.mode == "blend":
            left = (self.num_micro_batches - self.micro_batch).clamp(min=0) / self.num_micro_batches
            return normalize_counts(self.counts + left * self.previous_counts)
        return normalize_counts(self.counts)

    def _scale(self, num_tokens: torch.Tensor, **labels) -> torch.Tensor:
        exact = self._announced and self._num_tokens_known and self.training and torch.is_grad_enabled()
        return balance_loss_scale(
            num_tokens,
            self.step_num_tokens if exact else None,
            self.num_micro_batches,
            self.world_size,
            self._summed_over_ranks,
            **labels,
        )

    def __getstate__(self) -> dict:
        # Process groups and handles cannot be copied or pickled; trainers deep-copy models for reference policies.
        return {**self.__dict__, "process_group": None, "_reduction": None}

    def extra_repr(self) -> str:
        return f"layers={len(self.num_experts)}, num_experts={max(self.num_experts)}, mode={self.mode!r}"


class PendingBalance:
    """Counts on their way; made by [`LoadBalancer.begin`]."""

    def __init__(
        self,
        balancer: LoadBalancer,
        layers: tuple[LayerRouting, ...],
        token_mask: torch.Tensor | None,
        counts: torch.Tensor,
        num_tokens: torch.Tensor,
        payload: torch.Tensor | None,
        work: Any,
    ):
        self.balancer = balancer
        self.layers = layers
        self.token_mask = token_mask
        self.counts = counts
        self.num_tokens = num_tokens
        self.payload = payload
        self.work = work

    def finish(
        self,
        labels: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        labels_are_shifted: bool = False,
    ) -> BalanceLosses:
        """Wait for the counts, record them and compute the losses.

        Args:
            labels (`torch.Tensor` of shape `(B, S)` or `(B,)`, *optional*): What the model's loss is computed on;
                -100 is ignored.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*): What the Trainer passed to the model.
            labels_are_shifted (`bool`, defaults to `False`): Whether position 0 of `labels` `(B, S)` counts: `True`
                for `shift_labels` of a causal language model and for token classification.

        Returns:
            [`BalanceLosses`]
        """
        balancer = self.balancer
        if self.work is not None:
            self.work.wait()
        if self.payload is not None:
            balancer._record(self.payload)
        frequency = balancer._frequency(self.counts, recorded=self.payload is not None)  # (L, N)
        if balancer.local_fraction:
            frequency = frequency + balancer.local_fraction * normalize_counts(self.counts)
        device = self.counts.device
        losses, z_losses, penalties = [], [], []
        for layer, width, row in zip(self.layers, balancer.num_experts, frequency, strict=True):
            mean = mean_probability(layer.distribution(), self.token_mask)  # (N,)
            losses.append(balance_value(mean, row[:width], layer.balance_weights).to(device))
            if balancer.z_loss:
                z_losses.append(router_z_loss(layer.logits, self.token_mask).to(device))
            if layer.penalty is not None:
                penalties.append(masked_mean(layer.penalty, self.token_mask).to(device))
        return BalanceLosses(
            torch.stack(losses).mean(),
            torch.stack(z_losses).mean() if z_losses else None,
            balancer._scale(
                self.num_tokens,
                labels=labels,
                num_items_in_batch=num_items_in_batch,
                labels_are_shifted=labels_are_shifted,
            ),
            torch.stack(penalties).sum() / len(losses) if penalties else None,
        )


def validate_balance_options(mode: str, local_fraction: float = 0.0, bias_update_speed: float = 0.0) -> None:
    """Checks the balance options of a config before anything is built.

    Raises:
        ValueError: names the option, its value and what is allowed.
    """
    if mode not in BALANCE_MODES:
        raise ValueError(f"`balance_mode` must be one of {list(BALANCE_MODES)}, got {mode!r}.")
    if not 0 <= local_fraction <= 1:
        raise ValueError(f"`balance_local_fraction` must be between 0 and 1, got {local_fraction}.")
    if bias_update_speed < 0:
        raise ValueError(f"`router_bias_update_speed` must be at least 0, got {bias_update_speed}.")
