"""Read-ME: refactors a dense language model into experts that are subsets of its neurons (2410.19123).

Shapes: N experts, D hidden, I channels of the dense feed-forward.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .channel_sets import channel_sets
from .feed_forward import locate_feed_forwards
from .refactor_checkpoint import build_read_me, read_me_config, read_me_provenance, read_me_report
from .report import UpcycleReport, measure_gap
from .sources import load_source, source_name
from .statistics import calibration_batches, collect_statistics


__all__ = ["convert_to_readme"]

logger = logging.get_logger(__name__)

SOURCE_TYPES = ("llama", "mistral", "qwen2")
# Masks of a domain with fewer tokens than this are noisy.
FEW_TOKENS = 1024


def convert_to_readme(
    model: str | PreTrainedModel,
    domains: Mapping[str, Any],
    keep: float = 0.5,
    *,
    tokenizer: Any = None,
    samples: int = 16,
    length: int | None = None,
    router_hidden_size: int | None = None,
    router_num_heads: int = 4,
    router_layers: int = 1,
    multiple_of: int = 8,
    check: bool = True,
    seed: int = 0,
) -> tuple[PreTrainedModel, UpcycleReport]:
    r"""Makes a [`~hf_moe.ReadMeForCausalLM`] of a dense model: one expert per domain of text.

    In each layer, expert i keeps the `keep` share of channels with the largest mean |a_c| on the texts of domain i,
    a = act(W_g x) * (W_u x): F_i(x) = sum over c in M_i of W_d[:, c] a_c, without scaling (Sec. 3). Channels that all
    experts keep are stored once. The router's embedding starts as the first columns of the model's own; its other
    weights are random, so that routing means nothing before [`~hf_moe.trainers.ReadMeTrainer`] has run. Unless
    `keep=1`, the model's text does not either: half of every feed-forward is gone.

    Args:
        model (`str` or `PreTrainedModel`): A Llama, a Mistral without a sliding window or a Qwen2, with its head.
        domains (`Mapping[str, Any]`): Per domain its calibration texts, an iterable that is read no further than
            needed, or token ids and model inputs as [`~hf_moe.upcycle`] takes them.
        keep (`float`, defaults to 0.5): Share of the channels an expert keeps.
        tokenizer (*optional*): For texts; the model's own by default.
        samples (`int`, defaults to 16): Windows of text per domain.
        length (`int`, *optional*): Tokens of a window; 4096 by default, or as many as the model has positions.
        router_hidden_size (`int`, *optional*): Width of the router; 512 by default, or the model's own if smaller.
        router_num_heads (`int`, defaults to 4): Heads of the router.
        router_layers (`int`, defaults to 1): Blocks of the router.
        multiple_of (`int`, defaults to 8): See [`~hf_moe.upcycling.channel_sets`].
        check (`bool`, defaults to `True`): Run both models on the first window of each domain and report how far
            their logits are apart.
        seed (`int`, defaults to 0): Of the router's random weights.

    Returns:
        `tuple[ReadMeForCausalLM, UpcycleReport]`: In evaluation mode, in the dtype and on the device of `model` (the
        router in float32), and what is known about it.

    Raises:
        ValueError: another type of model, fewer than two domains, a number out of range; the message has the fix.

    Example:

    ```python
    >>> from hf_moe.corpora import load_corpus
    >>> from hf_moe.upcycling import convert_to_readme
    >>> domains = {name: load_corpus(name).train for name in ("reference", "code", "licences")}
    >>> model, report = convert_to_readme("HuggingFaceTB/SmolLM2-135M-Instruct", domains)
    ```
    """
    _check_numbers(domains, keep, samples, length, multiple_of)
    name = source_name(model)
    model = load_source(model)
    _check_source(model)
    sites = locate_feed_forwards(model)
    positions = model.config.max_position_embeddings
    length = min(4096, positions) if length is None else length
    find_tokenizer = cache(lambda: tokenizer if tokenizer is not None else _tokenizer(model))
    width = model.config.hidden_size
    router_hidden_size = min(512, width) if router_hidden_size is None else router_hidden_size
    if router_hidden_size > width:
        raise ValueError(
            f"`router_hidden_size` must be at most the model's `hidden_size` ({width}), whose embedding it starts "
            f"with, got {router_hidden_size}."
        )
    kept = max(1, round(keep * model.config.intermediate_size))
    router = {"router_hidden_size": router_hidden_size, "router_num_heads": router_num_heads}
    router["router_layers"] = router_layers
    read_me_config(model, len(domains), [0] * len(sites), [kept] * len(sites), router)  # refuses before the long part

    activity, tokens, first = {}, {}, []
    for domain, texts in domains.items():
        batches = list(_windows(texts, find_tokenizer, domain, samples, length))
        stats = collect_statistics(model, sites, batches, {"activity"})
        activity[domain] = {layer: layer_stats.importance["activity"] for layer, layer_stats in stats.items()}
        tokens[domain] = next(iter(stats.values())).num_tokens
        first.append(batches[0])
        if tokens[domain] < FEW_TOKENS:
            logger.warning(f"Domain {domain!r} has {tokens[domain]} tokens: the channels it keeps are a noisy choice.")
    sets = {
        site.layer_idx: channel_sets(torch.stack([a[site.layer_idx] for a in activity.values()]), kept, multiple_of)
        for site in sites
    }
    sizes = [sets[site.layer_idx].expert_size for site in sites], [len(sets[site.layer_idx].shared) for site in sites]
    config = read_me_config(model, len(domains), *sizes, router)
    moe = build_read_me(model, config, sites, sets, seed)
    report = read_me_report(model, moe, name, sites, sets, list(domains), keep, seed)
    if check:
        report.measured = measure_gap(model, moe, first, "calibration")
    moe.config.upcycling = read_me_provenance(report, model, tokens)
    return moe, report


# -- what goes in ----------------------------------------------------------------------------------------------------
def _check_numbers(domains: Any, keep: float, samples: int, length: int | None, multiple_of: int) -> None:
    if not isinstance(domains, Mapping) or len(domains) < 2:
        raise ValueError(
            "`domains` must be a mapping of at least two domains, such as {'code': [...], 'prose': [...]}."
        )
    if not 0 < keep <= 1:
        raise ValueError(f"`keep` must be above 0 and at most 1, got {keep}.")
    for name, value in (("samples", samples), ("length", length), ("multiple_of", multiple_of)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")


def _check_source(model: PreTrainedModel) -> None:
    config = model.config
    if config.model_type not in SOURCE_TYPES or not hasattr(model, "lm_head"):
        raise ValueError(
            f"{type(model).__name__} cannot become `read_me`, which has Llama's attention: pass the causal language "
            f"model of one of the types {', '.join(SOURCE_TYPES)}."
        )
    if getattr(config, "sliding_window", None) is not None:
        raise ValueError(
            f"{type(model).__name__} has a sliding window (`sliding_window={config.sliding_window}`), and `read_me` "
            "none. Load it with `sliding_window=None` if texts are no longer than that."
        )
    if getattr(config, "mlp_bias", False):
        raise ValueError("`mlp_bias=True` is not supported: the feed-forwards of `read_me` have no biases.")


def _tokenizer(model: PreTrainedModel) -> Any:
    from transformers import AutoTokenizer

    if not model.name_or_path:
        return None  # whoever needs it says so
    try:
        return AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError):
        return None


def _windows(
    texts: Any, find_tokenizer: Callable[[], Any], domain: str, samples: int, length: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Model inputs of one domain: texts are cut in windows of `length` tokens, of which the first `samples` count."""
    if isinstance(texts, (str, torch.Tensor, Mapping)) or not isinstance(texts, Iterable):
        texts = calibration_batches(texts, find_tokenizer() if isinstance(texts, str) else None)

    def cut() -> Iterator[dict[str, torch.Tensor]]:
        for text in texts:
            (inputs,) = calibration_batches([text], find_tokenizer() if isinstance(text, str) else None)
            size = inputs["input_ids"].shape[-1]
            for start in range(0, size, length):
                yield {name: value[:, start : start + length] for name, value in inputs.items()}

    windows = list(islice(cut(), samples))
    if not windows:
        raise ValueError(f"`domains[{domain!r}]` has no text.")
    yield from windows
