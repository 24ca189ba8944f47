"""Language models, and the LLaVAs they become."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from data import CAPTION, CHAT_TEMPLATE
from mosaics import PLACES, WORDS
from questions import NOTHING, NOWHERE, PHRASINGS
from torch import nn
from tower import image_processor
from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_moe import assemble_llava, load_dense


__all__ = ["activated", "language_model", "make_llava", "shallow"]


def language_model(name: str) -> tuple[Any, Any]:
    """A causal language model in float32 and its tokenizer; `"random"` is a tiny one without knowledge."""
    if name == "random":
        return _tiny()
    model, tokenizer = load_dense(name, torch.float32)
    # Padding must not look like the end of an answer, which has a label.
    tokenizer.pad_token = "<|endoftext|>"
    return model, tokenizer


def _tiny() -> tuple[Any, Any]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [CAPTION, *(text for texts in PHRASINGS.values() for text in texts)]
    pieces.train_from_iterator([*texts, *(f" {word}" for word in (*WORDS, *PLACES, NOTHING, NOWHERE))], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token=special[0], eos_token=special[2])
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config), tokenizer


@torch.no_grad()
def shallow(llava: Any, keep: Sequence[int]) -> Any:
    """The same LLaVA with some layers of its language model.

    Args:
        llava: Unchanged.
        keep (`Sequence[int]`): Those that stay.
    """
    config = copy.deepcopy(llava.config)
    config.text_config.num_hidden_layers = len(keep)
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = [config.text_config.layer_types[layer] for layer in keep]
    student = type(llava)(config)
    weights = llava.state_dict()
    for name, tensor in student.state_dict().items():
        before, found, after = name.partition("language_model.layers.")
        layer, _, rest = after.partition(".")
        tensor.copy_(weights[f"{before}{found}{keep[int(layer)]}.{rest}" if found else name])
    return student


def make_llava(tower: Path, name: str, seed: int) -> tuple[Any, Any]:
    """A LLaVA with a new projector, and its processor.

    Args:
        tower (`Path`): Where the small CLIP is saved.
        name (`str`): As in [`language_model`].
        seed (`int`): Of the projector.
    """
    model, tokenizer = language_model(name)
    vision = CLIPVisionModel.from_pretrained(tower)
    return assemble_llava(vision, model, tokenizer, image_processor(), chat_template=CHAT_TEMPLATE, seed=seed)


def activated(model: nn.Module) -> dict[str, float]:
    """Millions of parameters of a LLaVA: all of them, and those that a token goes through."""
    from hf_moe import moe_layers
    from hf_moe.active_compute import active_compute
    from hf_moe.views import has_moe_layers

    total = active = sum(parameter.numel() for parameter in model.parameters())
    if has_moe_layers(model):
        compute = active_compute(model)
        for view, size in zip(moe_layers(model), compute.per_expert, strict=True):
            active -= (view.num_experts - view.num_experts_per_tok) * size
    return {"parameters": total / 1e6, "activated": active / 1e6}
