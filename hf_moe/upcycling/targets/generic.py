"""The target for everything else: the dense model's own classes with MoE blocks in place of its feed-forwards."""

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .backbone import BackboneTarget


__all__ = ["GenericTarget"]


class GenericTarget(BackboneTarget):
    """`upcycled_<type>`, for every model type of transformers whose feed-forwards are plain modules.

    Attention, embeddings, heads and generation stay those of the dense model. Routers that hand state from layer to
    layer need a backbone that carries it, and are refused.
    """

    def __init__(self):
        super().__init__("generic", ())

    def refusal(self, model, plan):
        if model.config.model_type not in CONFIG_MAPPING_NAMES:
            return f"{model.config.model_type!r} is not a model type of transformers"
        if getattr(model.config, "is_heterogeneous", False):
            return "the layers of the source differ in shape"
        if getattr(model.config, "text_config", None) is not None:
            return (
                "its layers are described by `text_config`, and generic classes know one config; make its language "
                "model a MoE by itself (`upcycle(model.model.language_model, ...)`)"
            )
        if plan.shared == "residual" and getattr(model.config, "intermediate_size", None) is None:
            return "its config does not name the width of the residual branch"
        return None

    def config_class(self, source_config):
        from hf_moe.models.upcycled import upcycled_config_class

        return upcycled_config_class(source_config.model_type)

    def model_class(self, model, config):
        from hf_moe.models.upcycled import upcycled_model_class

        return upcycled_model_class(type(model), type(config))

    def config_fields(self, source_config, plan):
        form = plan.form
        config_fields = super().config_fields(source_config, plan)
        del config_fields["moe_layers"]
        return config_fields | {
            "moe_modules": list(plan.modules),
            "expert_type": ("swiglu" if form.gated else "mlp") + ("_bias" if form.biased else ""),
            "expert_hidden_size": form.hidden_size,
            "expert_hidden_act": form.activation,
        }

    def may_be_missing(self, key):
        # Blocks are called as the dense modules were, so only the part within a block tells.
        return super().may_be_missing(key) or (".gate." in key and not key.endswith(".gate.weight"))
