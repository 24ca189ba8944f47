"""T5 -> `moe_t5`: both stacks, whose layers the plan counts through."""

from .backbone import BackboneTarget


__all__ = ["T5Target"]


class T5Target(BackboneTarget):
    """T5 1.0 and 1.1 to `moe_t5`. Layers chosen in a stack become its MoE layers; without any it stays dense."""

    def __init__(self):
        super().__init__("moe_t5", ("t5",))

    def config_fields(self, source_config, plan):
        depth = source_config.num_layers  # the decoder's layers are counted on from there
        encoder = [layer for layer in plan.layers if layer < depth]
        decoder = [layer - depth for layer in plan.layers if layer >= depth]
        choices = {"moe_layers": encoder or "none", "decoder_moe_layers": decoder or "none"}
        return super().config_fields(source_config, plan) | choices

    def start_router(self, config, plan, rows, stats, generator, layer_idx):
        depth = config.num_layers
        stack = config.stack_config(is_decoder=layer_idx >= depth)
        return super().start_router(stack, plan, rows, stats, generator, layer_idx % depth)

    def layer_tensors(self, layer):
        return super().layer_tensors(layer._replace(name=layer.name.replace(".DenseReluDense", ".mlp")))
