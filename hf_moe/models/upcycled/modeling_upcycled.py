"""MoE blocks inside an otherwise dense model: the part every upcycled class shares.

Shapes: B batch, S sequence, T = B * S tokens, D hidden.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_moe.layer_config import LayerConfig
from hf_moe.layers import MoeBlock
from hf_moe.models.modeling import MoePreTrainedMixin
from hf_moe.routing.load_balancer import LayerRouting, LoadBalancer
from hf_moe.routing.output import RouterOutput


__all__ = ["UpcycledFeedForward", "UpcycledMixin"]


class UpcycledFeedForward(MoeBlock):
    """A [`MoeBlock`] with the signature of the feed-forward it replaces."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """`(..., D) -> (..., D)`; what else the dense feed-forward took is ignored."""
        return super().forward(hidden_states)[0]


class UpcycledMixin(MoePreTrainedMixin):
    """Goes in front of a dense model class: swaps the modules in, records routing, adds the router losses.

    Note: blocks do not see the padding mask (their decoder does not hand it on), so padding is routed like any token.
    It is left out of the losses and of `aux_loss`.
    """

    def __init__(self, config: Any, *args, **kwargs):
        # The dense classes inside refuse any experts implementation but "eager"; what was asked for is set afterwards.
        requested = config._experts_implementation
        config._experts_implementation = "eager"
        super().__init__(config, *args, **kwargs)
        self.config._experts_implementation = self.get_correct_experts_implementation(requested)

    def post_init(self) -> None:
        # The dense `__init__` ends with `post_init`: the last moment before weights are initialised. Inside a head
        # the base model is a plain dense one, so the outermost class swaps.
        base = self.base_model
        self._noted: list[torch.Tensor] | None = None
        for index, name in enumerate(self.config.moe_modules):
            parent, _, child = name.rpartition(".")
            block = UpcycledFeedForward(self._block_config(), index)
            layer: Any = base.get_submodule(parent)
            if child == "intermediate" and hasattr(layer, "output"):
                layer.output.dense = nn.Identity()  # BERT's layout: the feed-forward is two modules
            setattr(layer, child, block)
            block.gate.register_forward_hook(self._note_router_logits)
        if base is not self:
            # TRL calls the base model itself, which knows nothing of routing, and reads `router_logits`.
            base.register_forward_pre_hook(self._before_base_model, with_kwargs=True)
            base.register_forward_hook(self._after_base_model)
        self.load_balancer = LoadBalancer.from_config(self.config)
        self._keep_in_fp32_modules_strict = {re.escape(f"{name}.gate.") for name in self.config.moe_modules}
        super().post_init()

    def _before_base_model(self, _base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        self._noted = [] if kwargs.pop("output_router_logits", False) else None
        return args, kwargs

    def _note_router_logits(self, router: Any, _args: tuple, output: RouterOutput) -> None:
        if self._noted is not None:
            feed_forward = router.num_experts - self.config.num_zero_computation_experts
            self._noted.append(output.router_logits[:, :feed_forward])  # as wide as TRL expects

    def _after_base_model(self, _base: nn.Module, _args: tuple, outputs: Any) -> None:
        noted, self._noted = self._noted, None
        if noted:
            outputs["router_logits"] = tuple(noted)

    def _block_config(self) -> Any:
        """The model's config as a block reads it: D may be called otherwise, or differ from `hidden_size`."""
        config = self.config
        return LayerConfig(
            config,
            hidden_size=config.expert_hidden_size or config.hidden_size,
            initializer_range=getattr(config, "initializer_range", 0.02),
        )

    def forward(self, *args, output_router_logits: bool | None = None, **kwargs):
        """The dense forward; its output gains `aux_loss` and `router_logits` where routing is recorded.

        Args:
            output_router_logits (`bool`, *optional*): Record; in training with a router loss it happens anyway.
        """
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        config = self.config
        counts = (
            config.router_aux_loss_coef > 0
            or config.router_z_loss_coef > 0
            or config.router_bias_update_speed > 0
            or config.has_router_penalty
        )
        in_training = self.training and torch.is_grad_enabled() and counts
        if not self.adds_router_losses or not (wanted or in_training):
            return super().forward(*args, **kwargs)
        blocks = [block for _, block in self.moe_blocks()]
        return_dict = kwargs.pop("return_dict", None)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        with _collect(blocks) as recorded:
            outputs = super().forward(*args, return_dict=True, **kwargs)
        layers = [LayerRouting.from_router(b.gate, r.router_logits, r.top_k_index, r.penalty) for b, r in recorded]
        mask = kwargs.get("attention_mask")
        tokens = layers[0].index.shape[0]
        mask = mask.reshape(-1).bool() if isinstance(mask, torch.Tensor) and mask.numel() == tokens else None
        # Labels of a causal language model are shifted inside its loss; all others count as they are.
        labels, shift_labels = kwargs.get("labels"), kwargs.get("shift_labels")
        shifted = shift_labels is not None or self.loss_type != "ForCausalLM"
        labels = labels if shift_labels is None else shift_labels
        losses = self.load_balancer(layers, mask, labels, kwargs.get("num_items_in_batch"), shifted)
        loss = outputs.get("loss")
        if loss is not None:
            total = losses.total(self.config.router_aux_loss_coef, self.config.router_z_loss_coef)
            outputs["loss"] = loss + total.to(loss.device)
        outputs["aux_loss"] = losses.aux_loss
        outputs["router_logits"] = tuple(layer.logits for layer in layers)
        return outputs if return_dict else outputs.to_tuple()


@contextmanager
def _collect(blocks: list[nn.Module]) -> Iterator[list[tuple[nn.Module, RouterOutput]]]:
    """Collects `(block, router output)` of the forwards inside, in the order they happen."""
    recorded: list[tuple[nn.Module, RouterOutput]] = []
    handles = []
    try:
        for block in blocks:

            def hook(module, args, output, block=block):
                recorded.append((block, output))

            handles.append(block.gate.register_forward_hook(hook))
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
