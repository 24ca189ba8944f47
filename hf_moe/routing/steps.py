"""Optimizer steps for load balancers: who starts and ends them, in any training loop, and what a checkpoint keeps.

Shapes: L MoE layers, N experts, G micro-batches per optimizer step.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.utils import logging

from .discovery import find_balancers
from .selection_bias import update_selection_bias


__all__ = ["ROUTER_STATE_NAME", "BalanceSteps", "count_batch_targets", "count_batch_tokens", "target_mask"]

logger = logging.get_logger(__name__)

ROUTER_STATE_NAME = "router_state.safetensors"


class BalanceSteps:
    """Announces optimizer steps to every [`LoadBalancer`] of a model and moves its routers' selection biases.

    `GlobalBalanceCallback` uses it under a Trainer. In a loop of one's own, with accelerate or without, `step` after
    every micro-batch is all that is needed.

    Args:
        model (`nn.Module`): The model, wrapped or not.
        accelerator (`Accelerator`, *optional*): Says when gradients were synchronised, and G.
        num_micro_batches (`int`, defaults to 1): G where there is no accelerator.

    Raises:
        ValueError: the model has no load balancer, or a bias update was asked of routers without selection bias.

    Example:

    ```python
    >>> balance = BalanceSteps(model, accelerator)
    >>> accelerator.register_for_checkpointing(balance)
    >>> for batch in dataloader:
    ...     with accelerator.accumulate(model):
    ...         accelerator.backward(model(**batch).loss)
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    ...     balance.step()
    ```
    """

    def __init__(self, model: nn.Module, accelerator: Any = None, num_micro_batches: int = 1):
        self.balancers = find_balancers(model)
        if not self.balancers:
            raise ValueError(
                f"{type(model).__name__} has no `LoadBalancer`, so there are no balance steps to announce. "
                "Use a model of hf_moe, or give your own model a `hf_moe.routing.LoadBalancer`."
            )
        for name, (balancer, routers) in self.balancers.items():
            if balancer.bias_update_speed > 0:
                without = [r for r in routers if getattr(r, "e_score_correction_bias", None) is None]
                if without or len(routers) != len(balancer.num_experts):
                    raise ValueError(
                        f"`router_bias_update_speed={balancer.bias_update_speed}` needs a router with selection bias "
                        f"in each of the {len(balancer.num_experts)} MoE layers of {name!r}, found {len(routers)} "
                        f"routers, {len(without)} of them without. Set it to 0.0, or use a router that has "
                        "`e_score_correction_bias`, such as 'sigmoid_topk'."
                    )
        self.accelerator = accelerator
        self.num_micro_batches = num_micro_batches
        self._micro_batch = 0
        if accelerator is not None:
            self.num_micro_batches = accelerator.gradient_accumulation_steps
        self.begin(self.num_micro_batches)

    def count(self, batches: Iterable[Mapping[str, Any]]) -> dict[str, int | torch.Tensor]:
        """What some batches hold of the things the balancers count: arguments of `begin`.

        Raises:
            ValueError: a batch holds none of them.
        """
        batches, found = list(batches), {}
        for balancer, _ in self.balancers.values():
            if balancer.tokens_per_image is not None:
                found["num_images"] = count_batch_images(batches)
            elif balancer.counts_targets:
                found["num_targets"] = count_batch_targets(batches)
            else:
                found["num_tokens"] = count_batch_tokens(batches)
        return found

    def begin(
        self,
        num_micro_batches: int,
        num_tokens: int | torch.Tensor | None = None,
        num_targets: int | torch.Tensor | None = None,
        num_images: int | torch.Tensor | None = None,
        **kwargs,
    ) -> None:
        """Start a step on every balancer; see [`LoadBalancer.begin_step`] for the other arguments.

        Args:
            num_targets (`int` or `torch.Tensor`, *optional*): T of the decoder of an encoder-decoder model.
            num_images (`int` or `torch.Tensor`, *optional*): Images of the step, for towers that see them.
        """
        for balancer, _ in self.balancers.values():
            if balancer.tokens_per_image is not None:
                tokens = None if num_images is None else num_images * balancer.tokens_per_image
            else:
                tokens = num_targets if balancer.counts_targets else num_tokens
            balancer.begin_step(num_micro_batches, tokens, **kwargs)

    def sum_over_ranks(self, value: int | torch.Tensor) -> torch.Tensor:
        """`value` of this rank plus that of the others in the balancers' group, a 0-dim int64 tensor."""
        balancer, _ = next(iter(self.balancers.values()))
        total = torch.as_tensor(value, dtype=torch.int64, device=balancer.counts.device).clone()
        if balancer.world_size > 1:
            dist.all_reduce(total, group=balancer.process_group)
        return total

    def start_reduction(self) -> None:
        """See [`LoadBalancer.start_reduction`]."""
        for balancer, _ in self.balancers.values():
            balancer.start_reduction()

    def end(self) -> None:
        """Close the step: its counts become the previous ones, and selection biases follow them."""
        for balancer, routers in self.balancers.values():
            counts = balancer.end_step()
            if balancer.bias_update_speed > 0:
                update_selection_bias(routers, counts, balancer.bias_update_speed)

    def step(self) -> None:
        """One micro-batch is done. Ends the step and begins the next one where gradients were synchronised."""
        self._micro_batch += 1
        if self.accelerator is not None:
            synced = self.accelerator.sync_gradients
        else:
            synced = self._micro_batch % self.num_micro_batches == 0
        if synced:
            self._micro_batch = 0
            self.end()
            self.begin(self.num_micro_batches)

    def close(self) -> None:
        """Training is over; see [`LoadBalancer.close`]."""
        for balancer, _ in self.balancers.values():
            balancer.close()

    # -- checkpoints ---------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, torch.Tensor]:
        """Every counter of every balancer. `register_for_checkpointing` of accelerate calls this."""
        return {
            f"{name}.{key}": buffer.detach().clone()
            for name, (balancer, _) in self.balancers.items()
            for key, buffer in balancer.named_buffers(recurse=False)
        }

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: names or shapes are those of another model.
        """
        own = self.state_dict()
        if own.keys() != state_dict.keys() or any(own[k].shape != v.shape for k, v in state_dict.items()):
            wanted = {k: tuple(v.shape) for k, v in own.items()}
            raise ValueError(
                f"the router state has { ({k: tuple(v.shape) for k, v in state_dict.items()}) }, but this model needs "
                f"{wanted}. Resume with the model that wrote it, or delete {ROUTER_STATE_NAME} to start with empty "
                "counters."
            )
        for name, (balancer, _) in self.balancers.items():
            for key, buffer in balancer.named_buffers(recurse=False):
                buffer.copy_(state_dict[f"{name}.{key}"])

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `router_state.safetensors`, whole or not at all."""
        path = Path(folder) / ROUTER_STATE_NAME
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            state = {key: value.cpu().contiguous() for key, value in self.state_dict().items()}
            save_file(state, temporary, metadata={"format": "pt"})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def load(self, folders: Iterable[str | os.PathLike]) -> Path | None:
        """Read `router_state.safetensors` from the first folder that has it; rank 0's counters go to every rank.

        Returns:
            `Path`, or `None` where no folder has it (counters are then left as they are).

        Raises:
            ValueError: the file cannot be read or belongs to another model.
        """
        path = next((p for p in (Path(f) / ROUTER_STATE_NAME for f in folders) if p.is_file()), None)
        if path is not None:
            try:
                with safe_open(path, framework="pt") as file:
                    state = {key: file.get_tensor(key) for key in file.keys()}
            except SafetensorError as error:
                raise ValueError(
                    f"{path} cannot be read ({error}). Delete it to resume with empty counters."
                ) from error
            self.load_state_dict(state)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # Nodes without a shared disk have no file; their counters must still be the same.
            for balancer, _ in self.balancers.values():
                for buffer in balancer.buffers(recurse=False):
                    dist.broadcast(buffer, src=0)
        return path


def count_batch_tokens(batches: Iterable[Mapping[str, Any]]) -> int | torch.Tensor:
    """Tokens of some batches, padding left out, as models count them: by `attention_mask` where there is one.

    Args:
        batches (`Iterable[Mapping]`): Inputs of the model, with `attention_mask` `(B, S)`, `input_ids` `(B, S)` or
            `inputs_embeds` `(B, S, D)`.

    Raises:
        ValueError: a batch has none of these.
    """
    total: int | torch.Tensor = 0
    for batch in batches:
        mask, ids, embeds = (batch.get(key) for key in ("attention_mask", "input_ids", "inputs_embeds"))
        if mask is not None and mask.dim() == 2:
            total = total + mask.ne(0).sum()
        elif ids is not None:
            total = total + ids.numel()
        elif embeds is not None:
            total = total + embeds.shape[:-1].numel()
        else:
            raise ValueError(
                f"cannot count the tokens of a batch with the keys {sorted(batch)}: it needs `attention_mask`, "
                "`input_ids` or `inputs_embeds`."
            )
    return total


def count_batch_images(batches: Iterable[Mapping[str, Any]]) -> int:
    """Images of some batches.

    Args:
        batches (`Iterable[Mapping]`): Inputs of the model, with `pixel_values` of shape `(B, channels, H, W)`.

    Raises:
        ValueError: a batch has no images.
    """
    total = 0
    for batch in batches:
        if batch.get("pixel_values") is None:
            raise ValueError(f"cannot count the images of a batch with the keys {sorted(batch)}: no `pixel_values`.")
        total += batch["pixel_values"].shape[0]
    return total


def target_mask(labels: torch.Tensor) -> torch.Tensor:
    """Which inputs of an encoder-decoder's decoder matter: those up to the last target of their row.

    Args:
        labels (`torch.Tensor` of shape `(B, S)`): Targets; -100 is ignored.

    Returns:
        `torch.Tensor` of shape `(B, S)`, int64: 0 behind the last target. The first position is always 1.
    """
    mask = labels.ne(-100).flip(-1).cumsum(-1).gt(0).flip(-1).long()
    mask[:, 0] = 1  # attention over nothing is not a number
    return mask


def count_batch_targets(batches: Iterable[Mapping[str, Any]]) -> int | torch.Tensor:
    """Tokens of some batches as the decoder of an encoder-decoder model counts them.

    Args:
        batches (`Iterable[Mapping]`): Inputs of the model, with `decoder_attention_mask`, `labels`,
            `decoder_input_ids` `(B, S)` or `decoder_inputs_embeds` `(B, S, D)`.

    Raises:
        ValueError: a batch has none of these.
    """
    total: int | torch.Tensor = 0
    for batch in batches:
        mask = batch.get("decoder_attention_mask")
        ids, embeds = batch.get("decoder_input_ids"), batch.get("decoder_inputs_embeds")
        if mask is None and batch.get("labels") is not None:
            mask = target_mask(batch["labels"])
        if mask is not None and mask.dim() == 2:
            total = total + mask.ne(0).sum()
        elif ids is not None:
            total = total + ids.numel()
        elif embeds is not None:
            total = total + embeds.shape[:-1].numel()
        else:
            raise ValueError(
                f"cannot count the target tokens of a batch with the keys {sorted(batch)}: it needs `labels`, "
                "`decoder_attention_mask`, `decoder_input_ids` or `decoder_inputs_embeds`."
            )
    return total
