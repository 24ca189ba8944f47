"""Declares a backbone: one config class and the names of the dense classes it builds on.

The five classes of a family (base of all, model, causal LM, sequence and token classification) differ between
families in nothing but their dense parents, so they are made from the declaration, when first asked for.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from hf_moe.registration import LOCK, register_config


__all__ = ["Backbone", "declare_backbone"]

HEADS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification")


@dataclass(frozen=True)
class Backbone:
    """A family of model classes yet to be made.

    Args:
        package (`str`): `__name__` of the declaring package; the classes become its attributes.
        config_class (`type`): `Moe<Backbone>Config`; the classes are named after it.
        dense_module (`str`): Absolute module name of the dense modeling file.
        prefix (`str`): Prefix of the dense classes, `"Llama"` in `LlamaModel`.
        layer (`str`, *optional*): Dense decoder layer class; `<prefix>DecoderLayer` by default.
        causal_lm (`str`, *optional*): Dense language model class; `<prefix>ForCausalLM` by default.
        layers_attribute (`str`, defaults to `"layers"`): Where the base model keeps its layers.
        layer_mixin (`str`, *optional*): `"module:Class"` in place of [`MoeDecoderLayerMixin`], relative to `package`.
        lm_head_bias (`bool`, defaults to `False`): Whether the language-model head has a bias.
    """

    package: str
    config_class: type
    dense_module: str
    prefix: str
    layer: str | None = None
    causal_lm: str | None = None
    layers_attribute: str = "layers"
    layer_mixin: str | None = None
    lm_head_bias: bool = False

    #: Suffixes of the classes that enter an Auto table, and of the others.
    heads: ClassVar[tuple[str, ...]] = HEADS
    parts: ClassVar[tuple[str, ...]] = ("PreTrainedModel", "DecoderLayer")

    @property
    def name(self) -> str:
        """`"MoeLlama"` for `MoeLlamaConfig`."""
        return self.config_class.__name__.removesuffix("Config")

    @property
    def class_names(self) -> list[str]:
        """Names of the model classes."""
        return [self.name + suffix for suffix in (*self.parts, *self.heads)]

    def build(self) -> dict[str, type]:
        """Makes the classes and sets them on the declaring package.

        Returns:
            `dict`: Model classes by the name of their Auto class.
        """
        package = importlib.import_module(self.package)
        with LOCK:
            if self.name + self.heads[-1] not in vars(package):  # the last one made
                self.make_classes()
        return {
            f"Auto{head}" if head == "Model" else f"AutoModel{head}": getattr(package, self.name + head)
            for head in self.heads
        }

    def make(self, suffix: str, bases: tuple[type, ...], doc: str, **attributes) -> type:
        """Makes the class `<name><suffix>` and sets it on the declaring package."""
        made = type(self.name + suffix, bases, {"__module__": self.package, "__doc__": doc, **attributes})
        setattr(importlib.import_module(self.package), made.__name__, made)
        return made

    def make_classes(self) -> None:
        """Makes all of them; the last of `heads` comes last."""
        from transformers import GenerationMixin
        from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification

        from . import modeling as moe

        dense = importlib.import_module(self.dense_module)
        dense_base = getattr(dense, f"{self.prefix}PreTrainedModel")
        dense_layer = getattr(dense, self.layer or f"{self.prefix}DecoderLayer")
        dense_lm = getattr(dense, self.causal_lm or f"{self.prefix}ForCausalLM")

        make = self.make
        layer = make("DecoderLayer", (self._layer_mixin(moe), dense_layer), "A layer that may hold a `MoeBlock`.")
        base = make(
            "PreTrainedModel",
            (moe.MoePreTrainedMixin, dense_base),
            f"Base of the `{self.config_class.model_type}` classes.",
            config_class=self.config_class,
            _no_split_modules=[layer.__name__],
            _can_record_outputs={
                **dense_base._can_record_outputs,
                **moe.MoePreTrainedMixin.ROUTER_RECORDS,
                "hidden_states": layer,
            },
        )
        model = make(
            "Model",
            (moe.MoeModelMixin, base, getattr(dense, f"{self.prefix}Model")),
            "The decoder without a head.",
            moe_layer_class=layer,
            layers_attribute=self.layers_attribute,
        )
        plans = ("_tied_weights_keys", "_tp_plan", "_pp_plan", "_fsdp_plan")
        make(
            "ForCausalLM",
            (moe.MoeForCausalLMMixin, base, GenerationMixin),
            "Language model; see [`MoeForCausalLMMixin`] for what `forward` takes and returns.",
            base_class=model,
            lm_head_bias=self.lm_head_bias,
            **{plan: vars(dense_lm)[plan] for plan in plans if plan in vars(dense_lm)},
        )
        # The generic heads would set their own `base_model_prefix`.
        prefix = {"base_model_prefix": dense_base.base_model_prefix}
        make(
            "ForSequenceClassification",
            (moe.MoeForSequenceClassificationMixin, GenericForSequenceClassification, base),
            "Sequence classification at the last token.",
            **prefix,
        )
        make(
            "ForTokenClassification",
            (moe.MoeForTokenClassificationMixin, GenericForTokenClassification, base),
            "Token classification.",
            **prefix,
        )

    def _layer_mixin(self, moe) -> type:
        if self.layer_mixin is None:
            return moe.MoeDecoderLayerMixin
        module, _, name = self.layer_mixin.partition(":")
        return getattr(importlib.import_module(module, self.package), name)


def declare_backbone(
    package: str,
    config_class: type,
    dense_module: str,
    prefix: str,
    *,
    kind: type[Backbone] = Backbone,
    **options,
) -> Callable:
    """Registers a backbone's config and returns the `__getattr__` that makes its classes on first use.

    Args:
        package (`str`): `__name__` of the declaring package.
        config_class, dense_module, prefix, **options: See [`Backbone`].
        kind (`type`, defaults to [`Backbone`]): A subclass for models that are no plain decoders.

    Returns:
        `Callable`: To be bound to the package's `__getattr__`.

    Example:

    ```python
    __getattr__ = declare_backbone(__name__, MoeLlamaConfig, "transformers.models.llama.modeling_llama", "Llama")
    ```
    """
    backbone = kind(package, config_class, dense_module, prefix, **options)
    register_config(config_class, backbone.build)

    def __getattr__(name: str) -> type:
        if name not in backbone.class_names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        backbone.build()
        return getattr(importlib.import_module(package), name)

    return __getattr__
