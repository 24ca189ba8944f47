"""What the experts of a model are called with, in the form in which routers' decisions are recorded."""

import torch

from common.tiny_families import tiny_inputs
from hf_moe.views import moe_layers, record_routing


def received_by_experts(model, input_ids):
    """`(recorder, [(top_k_index, top_k_weights), ...])`, one pair for each layer that ran, in order."""
    calls, handles = {}, []
    for view in moe_layers(model):
        # the block's input too: Llama 4's experts receive nothing else, already multiplied
        def keep_input(_router, args, index=view.index):
            calls[index] = [args[0]]

        def keep(_experts, args, index=view.index):
            calls[index].extend(args)

        handles.append(view.router.register_forward_pre_hook(keep_input))
        handles.append(view.experts.register_forward_pre_hook(keep))
    try:
        with torch.no_grad(), record_routing(model) as recorder:
            model(**tiny_inputs(model, input_ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    recorder.layers = [layer for layer in recorder.layers if layer.top_k_index]
    views = {layer.view.index: layer.view for layer in recorder.layers}
    assert sorted(calls) == sorted(views)
    return recorder, [_as_recorded(views[index], *calls[index]) for index in sorted(calls)]


def _as_recorded(view, router_input, hidden_states, *decision):
    name = type(view.router).__name__
    if name == "Llama4Router":  # row e * T + t is the score of expert e for token t, times the token
        ratio = hidden_states.view(view.num_experts, *router_input.shape) / router_input
        scores = ratio.median(dim=-1).values.T  # (T, N)
        weights, index = scores.topk(int((scores > 0).sum(-1).max()), dim=-1)
        return index, weights
    if name == "SwitchTransformersTop1Router":
        mask, weights = decision
        dropped = mask.sum(-1) == 0
        return mask.argmax(-1).masked_fill(dropped, view.num_experts), weights.masked_fill(dropped, 0.0)
    index, weights = decision
    if name == "ZayaRouter":  # skipping the experts looks like expert 0 with weight 0
        index = index.masked_fill(weights == 0, view.num_experts - 1)
    return index, weights


def computing_slots(view, top_k_index, top_k_weights):
    """A recorded decision as the stacked experts see it: slots of our zero-computation experts are empty to them."""
    if view.rule is not None:
        return top_k_index, top_k_weights
    idle = top_k_index >= view.num_computing_experts
    return top_k_index.masked_fill(idle, view.num_computing_experts), top_k_weights.masked_fill(idle, 0.0)
