"""Upcycling from folder to folder, one layer at a time: for models that do not fit in memory twice.

Memory at the peak: one layer (its dense feed-forward and its experts) and one output shard. The source is read tensor
by tensor and the result never exists as a model.
"""

import copy
import os
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from hf_moe.checkpoints import CheckpointReader, CheckpointWriter
from hf_moe.hub import write_shim

from .builders.base import ExpertBuilder
from .feed_forward import FeedForwardSite, extract_feed_forward, locate_feed_forwards
from .plan import UpcycledLayer, UpcyclePlan, build_layer
from .recipe import make_plan, make_report, resolve_choices
from .report import UpcycleReport
from .router_init.base import RouterInit
from .sources import check_unquantized, source_name
from .targets.base import CheckpointTarget, Target
from .targets.choose import choose_target
from .weight_rules import WeightRule


__all__ = ["copy_rest", "skeleton", "upcycle_checkpoint"]

# What a source folder has besides weights and configs that belongs to the result too.
COPIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*",
          "*preprocessor_config.json", "processor_config.json")  # fmt: skip


def upcycle_checkpoint(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    num_experts: int,
    top_k: int,
    layers: str | list[int] = "all",
    max_shard_size: int = 1_000_000_000,
    experts: ExpertBuilder | None = None,
    shared: str | float | None = None,
    router: RouterInit | str = "auto",
    weights: str | WeightRule = "renormalise",
    scale: str | float = "auto",
    target: str | Target = "auto",
    seed: int = 0,
    **config_overrides: Any,
) -> UpcycleReport:
    """[`upcycle`] for checkpoints: reads one folder, writes another, never holds a whole model.

    The destination appears when it is complete: everything is written to a temporary folder beside it first.

    Args:
        source (`str`): Folder or Hub id with safetensors weights.
        destination (`str`): Folder to write; must not exist, or be empty.
        num_experts (`int`): Experts per MoE layer, N.
        top_k (`int`): Experts each token is sent to, K.
        layers (`str` or `list[int]`, defaults to `"all"`): See [`upcycle`].
        max_shard_size (`int`, defaults to 1e9): Bytes after which a weight file is closed.
        experts, shared, router, weights, scale, target, seed, **config_overrides: See [`upcycle`].

    Returns:
        [`UpcycleReport`]: With the prediction; nothing was run, so nothing is measured.

    Raises:
        ValueError: a recipe that looks at data or at other models (use [`upcycle`]), an unreadable or unfit
            checkpoint, a destination that is not empty.

    Example:

    ```python
    >>> report = upcycle_checkpoint("meta-llama/Llama-3.2-1B", "llama-moe", num_experts=8, top_k=2)
    ```
    """
    choices = resolve_choices(num_experts, top_k, experts, shared, router, weights, scale, seed)
    folder = _folder(source)
    model = skeleton(folder)
    sites = locate_feed_forwards(model, layers)
    plan = make_plan(model, sites, source_name(source), overrides=config_overrides, **choices)
    writer = choose_target(target, model, plan)
    if not isinstance(writer, CheckpointTarget):
        raise ValueError(f"`target={writer.name!r}` is not written as a checkpoint; use `upcycle`.")
    looks = plan.experts.needs | plan.router.needs | writer.needs
    if looks or plan.experts.reads_models or plan.router.reads_text:
        raise ValueError(
            f"This recipe looks at data or at other models ({', '.join(sorted(looks)) or 'prompts, fine-tunes'}), "
            "which needs a model that runs; use `hf_moe.upcycle` on the loaded model."
        )
    config = writer.config(model.config, plan)
    config.dtype = model.config.dtype
    config.upcycling = {**plan.provenance(writer.exactness(config, plan)), "target": writer.name}

    with CheckpointWriter(destination, max_shard_size) as shards:
        done = _convert(CheckpointReader(folder), shards, model, sites, plan, writer, config)
        result = _meta_result(writer, model, config)
        config.architectures = [type(result).__name__]
        write_shim(shards.partial, config)
        config.save_pretrained(shards.partial)
        copy_rest(folder, shards.partial)
    return make_report(plan, writer, writer.exactness(config, plan), model, result, done, None)


def _folder(source: str | os.PathLike) -> Path:
    if os.path.isdir(source):
        return Path(source)
    if os.path.isabs(source) or str(source).startswith((".", "~")):
        raise ValueError(f"`source` {str(source)!r} is not a folder.")
    return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors", *COPIED]))


def skeleton(folder: Path) -> PreTrainedModel:
    """The model of a checkpoint, without weights."""
    config = AutoConfig.from_pretrained(folder)
    check_unquantized(config, str(folder), "source")
    architecture = (config.architectures or [""])[0]
    cls: Any = getattr(transformers, architecture, None) or getattr(import_module("hf_moe"), architecture, None)
    with torch.device("meta"):
        return cls(config) if cls is not None else AutoModelForCausalLM.from_config(config)


def _meta_result(writer: CheckpointTarget, model: PreTrainedModel, config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return writer.model_class(model, config)(config)


def _convert(
    reader: CheckpointReader,
    shards: CheckpointWriter,
    model: PreTrainedModel,
    sites: list[FeedForwardSite],
    plan: UpcyclePlan,
    writer: CheckpointTarget,
    config: Any,
) -> list[UpcycledLayer]:
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = sorted(set(model.state_dict()) - tied - reader.keys())
    if missing:
        raise ValueError(
            f"{str(reader.folder)!r} does not hold the weights of a {type(model).__name__} under their current names "
            f"({missing[0]!r} is missing), so it cannot be converted file by file; use `hf_moe.upcycle`."
        )
    done = []
    for site in tqdm(sites, desc=f"Upcycling to {writer.name}"):
        ffn = extract_feed_forward(_filled(site, reader))
        layer = build_layer(plan, writer, config, ffn, site.name, site.layer_name, site.layer_idx)
        for key, tensor in writer.layer_tensors(layer).items():
            shards.add(key, tensor.clone())  # copies may be one tensor, which a file cannot hold twice
        done.append(layer._replace(router=None, experts=[], shared=None, residual=None))
    names = {site.name for site in sites}
    left_out = tied if getattr(config, "tie_word_embeddings", False) else set()
    for key in tqdm(sorted(reader.keys()), desc="Copying the rest"):
        if not writer.drops(key, names) and key not in left_out:
            shards.add(key, reader[key])
    return done


def _filled(site: FeedForwardSite, reader: CheckpointReader) -> nn.Module:
    """The feed-forward of one layer, with weights; the skeleton keeps none."""
    entries = {name: reader[site.checkpoint_key(name)] for name in site.module.state_dict()}
    dtype = next(iter(entries.values())).dtype
    module = copy.deepcopy(site.module).to_empty(device="cpu").to(dtype)
    module.load_state_dict(entries)
    return module


def copy_rest(folder: Path, partial: Path) -> None:
    """Copies what a folder has besides weights and config: tokenizer, processors, generation settings."""
    for pattern in COPIED:
        for path in folder.glob(pattern):
            shutil.copyfile(path, partial / path.name)
    if (folder / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(folder).save_pretrained(partial)
