"""Other experts than the router chose, for the length of a `with` block.

Shapes: B batch, S sequence, T = B * S tokens, N experts, K per token, K' with the override.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import nn

from .view_selection import Selector, make_selector
from .view_slots import fill_slots, replace_rows, skips_empty_slots
from .views import MoeLayerView, is_compiled, moe_layers


__all__ = ["routing_override"]


@contextmanager
def routing_override(
    model: nn.Module,
    ranks: Sequence[int] | None = None,
    *,
    top_m: int | None = None,
    random: int | None = None,
    threshold: float | None = None,
    fn: Callable | None = None,
    weights: Literal["native", "renormalised"] = "native",
    rows: slice | Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[None]:
    """Sends tokens to other experts than their router chose: rank-k routing (SCMoE, 2405.14507, Sec. 3.1), top-m,
    random experts, a probability threshold, or a function. Exactly one of the five is given.

    A forward hook on each router rewrites the experts and weights it returns; logits, and what a router hands to the
    next layer, stay. Blocks nest (the inner one decides) and leave nothing behind, also after an exception.
    `record_routing` started inside the block sees what the experts receive, started before it what the routers said.

    Args:
        model (`nn.Module`): A model accepted by [`moe_layers`].
        ranks (`Sequence[int]`, *optional*): Experts by their place, from 0, in the order the router chooses in: with
            selection biases and group limits. `[0, ..., K - 1]` is the unmodified model, `[1]` the second best alone.
        top_m (`int`, *optional*): The `m` best.
        random (`int`, *optional*): That many distinct experts, drawn uniformly for each token and layer.
        threshold (`float`, *optional*): The experts with at least this probability, between 0 and 1 (see
            [`MoeLayerView.probabilities`]), and always the most probable one.
        fn (`Callable`, *optional*): `fn(view, routing, scores) -> (weights, index)`, both `(T, K')`, from a
            [`MoeLayerView`], the router's own [`Routing`] and the `(T, N)` scores it ranks by. Index `N` with weight
            0 leaves a slot empty.
        weights (`str`, defaults to `"native"`): `"native"`: as the family weighs the experts it chooses, its
            normalisation and scale included. `"renormalised"`: divided by their sum, which then is 1.
        rows (`slice` or `Sequence[int]`, *optional*): Rows of the batch to override. The others keep experts and
            weights bit for bit; the fewer slots of the two are padded with slots of weight 0. The size of the batch
            is that of the `(B, S, D)` input of the MoE block.
        layers (`Sequence[int]`, *optional*): `MoeLayerView.index` of the layers to override; all by default.
        generator (`torch.Generator`, *optional*): Source of `random`. Activation checkpointing does not restore it,
            so leave it out there.

    Yields:
        `None`

    Raises:
        ValueError: `model` has no MoE layer, not exactly one selection is given, or one does not fit the layers.
            Nothing is changed on the model then.

    Note: A model that was compiled before runs uncompiled inside the block, because its code ignores hooks that came
    later. For that, `model` must be what `torch.compile` returned: from the model inside it nobody can tell. Compiling
    inside the block works as well, `fullgraph=True` included; after the block that code is traced again without the
    override. A `generator` breaks the graph.

    Note: Capacity limits of our own routers are not applied to overridden tokens; their padding tokens stay empty.
    Phi's router adds noise to its choice in training mode, and routers of ours with `noise` do; ranks then count
    without that noise, or with noise of their own.

    Example:

    ```python
    >>> with routing_override(model, ranks=[1]):  # every token goes to its second best expert only
    ...     weak = model(**inputs).logits
    ```
    """
    views = _chosen_layers(moe_layers(model), layers)
    selector = make_selector(
        views, ranks=ranks, top_m=top_m, random=random, threshold=threshold, fn=fn, generator=generator
    )
    if weights not in ("native", "renormalised"):
        raise ValueError(f"`weights` must be 'native' or 'renormalised', got {weights!r}.")
    if rows is not None and not isinstance(rows, slice):
        rows = [int(row) for row in rows]
        if not rows:
            raise ValueError("`rows` must name at least one row of the batch, got none. Leave it out to override all.")
    with ExitStack() as stack:
        for view in views:
            _hook(stack, view, selector, weights == "renormalised", rows)
        if is_compiled(model):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _chosen_layers(views: list[MoeLayerView], layers: Sequence[int] | None) -> list[MoeLayerView]:
    if layers is None:
        return views
    chosen = list(layers)
    if not chosen or not set(chosen) <= set(range(len(views))) or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"`layers` must name different MoE layers by their index, 0 to {len(views) - 1} in this model, got "
            f"{chosen}."
        )
    return [views[index] for index in sorted(chosen)]


def _hook(stack: ExitStack, view: MoeLayerView, selector: Selector, renormalise: bool, rows: Any) -> None:
    batch_size: list[int | None] = [None]

    def note_batch_size(_block: nn.Module, args: tuple, kwargs: dict) -> None:
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        hidden_states = next((value for value in tensors if value.dim() == 3), None)
        batch_size[0] = None if hidden_states is None else hidden_states.shape[0]

    def rewrite(_router: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        native = view.read(output)
        tokens = None if rows is None else _tokens_of_rows(view, rows, batch_size[0], native.router_logits)
        routing = native if tokens is None else type(native)(*(tensor[tokens] for tensor in native))
        weights, index = selector(view, routing, args, kwargs, tokens)
        if renormalise:
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        weights = weights.to(native.top_k_weights.dtype)
        if selector.leaves_slots_empty or view.rule is None:
            weights, index = fill_slots(view, routing, weights, index)
        if tokens is not None:
            weights, index = replace_rows(view, native, tokens, weights, index)
        return view.write(output, weights, index)

    if rows is not None:
        handle = view.block.register_forward_pre_hook(note_batch_size, with_kwargs=True)
        stack.callback(handle.remove)
    handle = view.router.register_forward_hook(rewrite, with_kwargs=True)
    stack.callback(handle.remove)
    if selector.leaves_slots_empty or rows is not None:
        stack.enter_context(skips_empty_slots(view))


def _tokens_of_rows(
    view: MoeLayerView, rows: slice | list[int], batch_size: int | None, router_logits: torch.Tensor
) -> slice | torch.Tensor:
    """Positions among the T tokens of those in `rows`."""
    num_tokens = router_logits.shape[0]
    if not batch_size or num_tokens % batch_size:
        raise ValueError(
            f"`rows` needs to know the rows of the batch, but {view.name} was not called with `(B, S, D)` hidden "
            f"states that make its {num_tokens} tokens. Leave `rows` out."
        )
    if not isinstance(rows, slice) and not all(-batch_size <= row < batch_size for row in rows):
        raise ValueError(f"`rows` must lie in the batch, which has {batch_size} rows, got {rows}.")
    if isinstance(rows, slice):
        start, stop, step = rows.indices(batch_size)
        if step == 1:  # a part of each tensor as it is: nothing has to be gathered
            length = num_tokens // batch_size
            return slice(start * length, max(start, stop) * length)
    tokens = torch.arange(num_tokens, device=router_logits.device).view(batch_size, -1)
    return tokens[rows].reshape(-1)
