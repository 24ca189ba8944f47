"""The card of one trained model: facts from the model, its config, the upcycling report and the evaluation."""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_moe.metrics.results import METRIC_NAMES

from .bibliography import Paper, find_papers
from .type_cards import TypeCard, type_card


if TYPE_CHECKING:
    from transformers import PreTrainedModel


__all__ = ["MoeModelCard", "create_model_card"]

TAGS = ("moe", "mixture-of-experts", "hf-moe")
PIPELINES = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "Model": "feature-extraction",
}
VISION_LANGUAGE = "image-text-to-text"
AUTO_CLASSES = {
    VISION_LANGUAGE: "AutoModelForImageTextToText",
    "text-generation": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "feature-extraction": "AutoModel",
}
# config field -> what a reader calls it; a field that is absent, None, empty or zero is left out
ARCHITECTURE = {
    "model_type": "Model type",
    "num_hidden_layers": "Layers",
    "moe_layers": "MoE layers",
    "num_experts": "Experts per MoE layer",
    "num_local_experts": "Experts per MoE layer",
    "num_experts_per_tok": "Experts per token",
    "num_shared_experts": "Shared experts",
    "residual_expert": "Dense branch beside the experts",
    "num_zero_experts": "Zero experts",
    "num_copy_experts": "Copy experts",
    "num_constant_experts": "Constant experts",
    "router_type": "Router",
    "router_config": "Router settings",
    "expert_type": "Expert",
    "moe_intermediate_size": "Width of an expert",
    "router_aux_loss_coef": "Balance loss coefficient",
    "balance_mode": "Balance statistics",
    "router_tau": "Balance weight of zero-computation experts",
    "expert_capacity_factor": "Capacity factor in training",
}
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
BASE_MODEL_KEYS = ("base_model", "upcycled_from", "source", "source_model")


class MoeModelCard(ModelCard):
    """A `huggingface_hub.ModelCard` with this package's template."""

    default_template_path = Path(__file__).parent / "moe_model.md"


def create_model_card(
    model: "PreTrainedModel",
    *,
    base_model: str | None = None,
    recipe: str | Mapping[str, Any] | None = None,
    report: Any = None,
    routing_table: Sequence[Mapping[str, Any]] | None = None,
    eval_results: Iterable[Mapping[str, Any] | EvalResult] | None = None,
    training: Mapping[str, Any] | None = None,
    figures: Iterable[str | os.PathLike | tuple[str, str | os.PathLike]] = (),
    paper: str | Sequence[str] | None = None,
    license: str | None = None,
    model_name: str | None = None,
    repo_id: str | None = None,
    datasets: str | list[str] | None = None,
    language: str | list[str] | None = None,
    tags: Iterable[str] = (),
) -> MoeModelCard:
    """Write the card of a model.

    Args:
        model (`PreTrainedModel`): The model; its config gives the architecture and, after upcycling, the recipe.
        base_model (`str`, *optional*): Hub id of the dense model; by default what the config's provenance says. A
            local folder is named in the text but kept out of the metadata, where only Hub ids are valid.
        recipe (`str` or `Mapping`, *optional*): How the model was made: Markdown, or names and values.
        report ([`~hf_moe.UpcycleReport`] or `Mapping`, *optional*): What upcycling preserved, and its cost.
        routing_table (`Sequence[Mapping]`, *optional*): One row per MoE layer, the same columns in each.
        eval_results (`Iterable`, *optional*): `EvalResult`s, their keyword arguments, or mappings with `metric`,
            `value` and `dataset`. They also go into the metadata (`model-index`).
        training (`Mapping`, *optional*): Names and values.
        figures (`Iterable`, *optional*): Image paths, or `(caption, path)`. The card refers to the bare file name, so
            save or push the images beside it.
        paper (`str` or `Sequence[str]`, *optional*): arXiv numbers to cite beside those of the model type.
        license (`str`, *optional*): Hub licence identifier. Left out if not given: it is that of the weights.
        model_name (`str`, *optional*): Title of the card.
        repo_id (`str`, *optional*): Where the model will be; used in the loading example.
        datasets, language (`str` or `list[str]`, *optional*): Metadata as in `ModelCardData`.
        tags (`Iterable[str]`, *optional*): Beside `moe`, `mixture-of-experts`, `hf-moe` and the model type.

    Returns:
        [`MoeModelCard`]: `str(card)`, `card.save(path)`, `card.validate()`, `card.push_to_hub(repo_id)`.

    Raises:
        ValueError: A metric has no finite value or no data set, or the rows of a table differ in their columns.

    Example:
        ```python
        card = create_model_card(moe, base_model="HuggingFaceTB/SmolLM2-135M-Instruct", report=report)
        card.save("smollm2-moe/README.md")
        ```
    """
    config = model.config
    provenance = getattr(config, "upcycling", None) or {}
    if base_model is None:
        base_model = next((provenance[key] for key in BASE_MODEL_KEYS if provenance.get(key)), None)
    name = model_name or (repo_id or "").split("/")[-1] or type(model).__name__
    pipeline = _pipeline(model)
    results = [_eval_result(result, pipeline) for result in eval_results or ()]
    data = ModelCardData(
        model_name=name,
        license=license,
        base_model=base_model if base_model and _is_repo_id(base_model) else None,
        datasets=datasets,
        language=language,
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=[*TAGS, config.model_type.replace("_", "-"), *tags],
        eval_results=results or None,
    )
    return MoeModelCard.from_template(
        data,
        title=name,
        description=_description(model, base_model),
        architecture=_pairs("Property", _architecture(model)),
        # the report says what the provenance says, in words
        recipe=recipe if isinstance(recipe, str) else _pairs("Setting", recipe or ({} if report else provenance)),
        report=_report_rows(report),
        training=_pairs("Setting", training or {}),
        evaluation=[_evaluation_row(result) for result in results],
        routing_table=_rows(routing_table or ()),
        figures=[_figure(figure) for figure in figures],
        loading=_loading(model, repo_id or (name if _is_repo_id(name) else "path/to/this/folder"), pipeline),
        citations=[entry.bibtex for entry in _papers(config, paper, f"{recipe} {provenance}")],
    )


def _description(model: "PreTrainedModel", base_model: str | None) -> str:
    model_type = model.config.model_type
    card = _type_card(model_type)
    summary = card.summary if card else ""
    text = f"A Mixture-of-Experts model of type `{model_type}`."
    if base_model and _is_repo_id(base_model):
        text = f"{text[:-1]}, made from [{base_model}](https://huggingface.co/{base_model})."
    elif base_model:
        text = f"{text[:-1]}, made from the local checkpoint `{Path(base_model).name}`."
    return f"{text} {summary}".strip()


def _architecture(model: "PreTrainedModel") -> dict[str, Any]:
    config = model.config
    facts: dict[str, Any] = {}
    for field, label in ARCHITECTURE.items():
        value = getattr(config, field, None)
        if value or (value == 0 and field == "router_aux_loss_coef"):
            facts.setdefault(label, value)
    facts["Parameters"] = model.num_parameters()
    if dtype := getattr(model, "dtype", None):
        facts["Precision"] = str(dtype).removeprefix("torch.")
    return facts


def _loading(model: "PreTrainedModel", repo_id: str, pipeline: str | None) -> str:
    auto_class = AUTO_CLASSES.get(pipeline or "", "AutoModel")
    native = type(model.config).__module__.startswith("transformers.")
    sees_images = pipeline == VISION_LANGUAGE
    reader, kind = ("processor", "AutoProcessor") if sees_images else ("tokenizer", "AutoTokenizer")
    lines = [f"from transformers import {auto_class}, {kind}"]
    if not native:
        lines.insert(0, "import hf_moe  # pip install hf-moe")
    lines += [
        "",
        f'model = {auto_class}.from_pretrained("{repo_id}")',
        f'{reader} = {kind}.from_pretrained("{repo_id}")',
    ]
    if sees_images:
        lines += [
            'inputs = processor(images=image, text="<image>What is this?", return_tensors="pt")',
            "print(processor.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
        ]
    if pipeline == "text-generation":
        lines += [
            'inputs = tokenizer("The river", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
        ]
    note = "" if not native else "\n\nTransformers alone loads this model; no plugin is needed."
    if not native and getattr(model.config, "auto_map", None):
        note = (
            "\n\nWhere hf-moe is installed, `trust_remote_code=True` replaces `import hf_moe`: the repository holds "
            "one import line, no other code."
        )
    code = "\n".join(lines)
    return f"```python\n{code}\n```{note}"


def _type_card(model_type: str) -> TypeCard | None:
    try:
        return type_card(model_type)
    except ValueError:  # transformers' own types and those of other packages have none
        return None


def _pipeline(model: "PreTrainedModel") -> str | None:
    name = type(model).__name__
    if name.endswith("ForConditionalGeneration") and getattr(model.config, "vision_config", None) is not None:
        return VISION_LANGUAGE
    return next((pipeline for suffix, pipeline in PIPELINES.items() if name.endswith(suffix)), None)


def _papers(config: Any, paper: str | Sequence[str] | None, text: str) -> list[Paper]:
    """Of the type, its router and the recipe that made it; those given; those a recipe mentions by number."""
    from hf_moe.listing import list_everything

    card = _type_card(config.model_type)
    papers = list(card.papers) if card else []
    provenance = getattr(config, "upcycling", None) or {}
    made_by = (provenance.get("experts") or {}, provenance.get("router") or {})
    names = {
        "routers": getattr(config, "router_type", None) if card else None,
        "recipes": made_by[0].get("name") if isinstance(made_by[0], Mapping) else None,
        "router-inits": made_by[1].get("name") if isinstance(made_by[1], Mapping) else None,
    }
    for kind, name in names.items():
        if name:
            entries = {entry.name: entry for entry in list_everything((kind,))[kind]}
            papers += find_papers(" ".join(entries[name].papers)) if name in entries else []
    given = " ".join([paper] if isinstance(paper, str) else paper or ())
    return list(dict.fromkeys([*papers, *find_papers(f"{given} {text}")]))


def _report_rows(report: Any) -> list[dict[str, str]]:
    if report is None or isinstance(report, Mapping):
        return _pairs("Measure", report or {})
    if hasattr(report, "rows"):
        return _pairs("Measure", dict(report.rows()))
    if dataclasses.is_dataclass(report) and not isinstance(report, type):
        return _pairs("Measure", dataclasses.asdict(report))
    raise TypeError(f"`report` must be an UpcycleReport or a mapping, got {type(report).__name__}.")


def _eval_result(result: Mapping[str, Any] | EvalResult, pipeline: str | None) -> EvalResult:
    if not isinstance(result, EvalResult):
        fields = dict(result)
        if "metric" in fields:
            dataset = str(fields.get("dataset") or "")
            if not dataset:
                raise ValueError(f"`eval_results` has {fields!r} without `dataset`: say what it was measured on.")
            slug = re.sub(r"[^\w.-]+", "-", dataset).strip("-.").lower()
            fields = {
                "task_type": fields.get("task", pipeline or "text-generation"),
                "dataset_type": dataset if _is_repo_id(dataset) else slug or "custom",
                "dataset_name": dataset,
                "dataset_split": fields.get("split"),
                "metric_type": str(fields["metric"]).lower().replace(" ", "_"),
                "metric_name": METRIC_NAMES.get(fields["metric"], str(fields["metric"])),
                "metric_value": fields.get("value"),
            }
        result = EvalResult(**fields)
    value = result.metric_value
    if value is None or (isinstance(value, float) and not abs(value) < float("inf")):
        raise ValueError(f"`eval_results` has {value!r} for {result.metric_type!r}: a card needs a finite number.")
    return dataclasses.replace(result, metric_value=float(f"{value:.6g}")) if isinstance(value, float) else result


def _evaluation_row(result: EvalResult) -> dict[str, str]:
    row = {"Metric": result.metric_name or result.metric_type, "Value": result.metric_value}
    where = result.dataset_name + (f" ({result.dataset_split})" if result.dataset_split else "")
    return {key: _cell(value) for key, value in {**row, "Data": where}.items()}


def _figure(figure: str | os.PathLike | tuple[str, str | os.PathLike]) -> dict[str, str]:
    caption, path = figure if isinstance(figure, tuple) else (None, figure)
    path = Path(path)
    caption = caption or path.stem.replace("_", " ").replace("-", " ").capitalize()
    return {"caption": caption.replace("]", ")").replace("[", "("), "name": path.name.replace(" ", "%20")}


def _pairs(header: str, values: Mapping[str, Any]) -> list[dict[str, str]]:
    rows = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value and not any(isinstance(v, (Mapping, list)) for v in value.values()):
            options = ", ".join(f"{name}={_cell(inner)}" for name, inner in value.items() if name != "name")
            value = f"{value['name']}({options})" if "name" in value else options
        if value is not None and value != {} and value != []:
            rows.append({header: _cell(str(key).replace("_", " ")), "Value": _cell(value)})
    return rows


def _rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    for row in rows:
        if list(row) != list(rows[0]):
            raise ValueError(
                f"`routing_table` must have the same columns in every row, got {list(rows[0])} and {list(row)}."
            )
    return [{_cell(key): _cell(value) for key, value in row.items()} for row in rows]


def _cell(value: Any) -> str:
    """A value as it stands in a Markdown table."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, (list, tuple)) and not any(isinstance(item, (Mapping, list)) for item in value):
        return ", ".join(_cell(item) for item in value)
    return " ".join(str(value).replace("|", "\\|").split())


def _is_repo_id(name: str) -> bool:
    return bool(REPO_ID.fullmatch(name)) and not os.path.exists(name)
