"""One uniform handle on the MoE layers of a transformers model, ours or in-tree, also under PEFT.

[`moe_layers`] finds them, [`record_routing`] listens to their routers, [`~hf_moe.routing_override`] overrules these.
`view_families.md` lists the families of transformers that can be read, and those that are refused.
"""

from .view_families import FAMILY_RULES
from .view_layer import MoeLayerView
from .view_recording import LayerRecord, RoutingRecorder, in_backward, is_compiled, record_routing
from .view_rules import FamilyRule, Routing
from .view_search import has_moe_layers, moe_layers, unwrap_model


__all__ = [
    "FAMILY_RULES",
    "FamilyRule",
    "LayerRecord",
    "MoeLayerView",
    "Routing",
    "RoutingRecorder",
    "has_moe_layers",
    "in_backward",
    "is_compiled",
    "moe_layers",
    "record_routing",
    "unwrap_model",
]
