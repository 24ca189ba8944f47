"""What Uni-MoE's training will do: its runs and their rows, known and checked before the first step."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from .uni_moe_config import UniMoeTrainingArguments, parse_mix
from .uni_moe_data import check_rows, choose_rows, row_modalities
from .vocabulary import check_vocabulary


__all__ = ["UniMoeRun", "check_model", "plan_runs"]


class UniMoeRun(NamedTuple):
    """One training of a phase.

    Args:
        phase (`str`): `"alignment"`, `"experts"` or `"joint"`.
        folder (`str`): Where it is kept, below the output folder.
        rows: Its data.
        stage (`str`, defaults to `"joint"`): Of [`set_uni_moe_stage`].
        connector (`str`, *optional*): Likewise.
        steps (`int`, *optional*), learning_rate (`float`, *optional*): Those of the arguments by default.
        mix (`str`): Modalities of an expert's data.
    """

    phase: str
    folder: str
    rows: Any
    stage: str = "joint"
    connector: str | None = None
    steps: int | None = None
    learning_rate: float | None = None
    mix: str = ""


def check_model(model: Any, processor: Any, args: UniMoeTrainingArguments) -> None:
    """Whether a model fits the phases it shall go through, and its processor.

    Args:
        model (`UniMoeForConditionalGeneration`): The model.
        processor ([`UniMoeProcessor`]): Its processor.
        args ([`UniMoeTrainingArguments`]): With the phases.

    Raises:
        ValueError: no Uni-MoE; several experts in phase 2, or only one in phase 3; a tokenizer with more tokens than
            the vocabulary, or other placeholders.
    """
    if getattr(model.config, "model_type", None) != "uni_moe":
        raise ValueError(f"`model` ({type(model).__name__}) is no Uni-MoE. Make one with `upcycle_uni_moe`.")
    counts = model.config.num_experts
    counts = counts if isinstance(counts, list) else [counts]
    if "experts" in args.phases and set(counts) != {1}:
        raise ValueError(
            f"Phase 2 tunes models of one expert per layer, but `model` has {counts}. Start from "
            "`upcycle_uni_moe(dense, num_experts=1, top_k=1, ...)`."
        )
    if args.phases == ("joint",) and args.expert_models is None and max(counts) < 2:
        raise ValueError(
            "Phase 3 tunes several experts, but `model` has one. Run phase 2 first, or give `expert_models`."
        )
    check_vocabulary(model, processor)
    for modality, token_id in model.config.token_ids.items():
        theirs = getattr(processor, f"{modality}_token_id", None)
        if theirs is not None and theirs != token_id:
            raise ValueError(
                f"`processing_class`: its placeholder of {modality} is token {theirs}, that of `model` {token_id}. "
                "Make the processor with `UniMoeProcessor.for_model(model.config, ...)`."
            )


def plan_runs(model: Any, processor: Any, args: UniMoeTrainingArguments, dataset: Any) -> list[UniMoeRun]:
    """The runs of the phases asked for, in their order.

    Args:
        model (`UniMoeForConditionalGeneration`): The model.
        processor ([`UniMoeProcessor`]): Its processor.
        args ([`UniMoeTrainingArguments`]): With the phases.
        dataset (`datasets.Dataset` or `Sequence[dict]`): All rows.

    Returns:
        `list[UniMoeRun]`

    Raises:
        ValueError: a connector or modality that the model has not, rows that it cannot read, or a run without rows.
    """
    readable = [name for name in model.config.token_ids if getattr(processor, f"{name}_token_id", None) is not None]
    trunk = model.base_model
    connectors = args.connectors or list(trunk.connectors())
    unknown = set(connectors) - trunk.connectors().keys()
    if unknown and "alignment" in args.phases:
        raise ValueError(f"`connectors` has {sorted(unknown)}, but the model has {sorted(trunk.connectors())} only.")
    mixes = args.expert_data or readable
    for mix in mixes if "experts" in args.phases else ():
        missing = parse_mix(mix) - {*readable, "text"}
        if missing:
            raise ValueError(f"`expert_data` has {mix!r}, but the model reads {sorted(readable)} only.")
    check_rows(dataset, processor, readable)
    kinds = row_modalities(dataset)
    runs: list[UniMoeRun] = []
    if "alignment" in args.phases:
        for connector in connectors:
            wanted = frozenset({"image", "video"} if connector == "image" else {connector})
            rows = _rows(dataset, kinds, wanted, f"the connector {connector!r}", "connectors")
            options = (args.alignment_steps, args.alignment_learning_rate)
            runs.append(UniMoeRun("alignment", f"alignment/{connector}", rows, "alignment", connector, *options))
    if "experts" in args.phases:
        for index, mix in enumerate(mixes):
            rows = _rows(dataset, kinds, parse_mix(mix), f"the expert of {mix!r}", "expert_data")
            runs.append(
                UniMoeRun("experts", f"experts/{index}-{mix}", rows, "dense", None, args.expert_steps, mix=mix)
            )
    if "joint" in args.phases:
        options = (args.joint_steps, args.joint_learning_rate)
        runs.append(UniMoeRun("joint", "joint", dataset, "joint", None, *options))
    return runs


def _rows(dataset: Any, kinds: Sequence[frozenset[str]], wanted: frozenset[str], what: str, option: str) -> Any:
    chosen = [index for index, kind in enumerate(kinds) if kind <= wanted]
    if not chosen:
        there = sorted({"+".join(sorted(kind)) for kind in kinds})
        raise ValueError(
            f"`train_dataset` has no rows for {what}: it has rows of {there}. Add some, or name others in `{option}`."
        )
    return choose_rows(dataset, chosen)
