"""What the Hub checks in a card's metadata, as far as a model card of ours can violate it."""

import re

import yaml


__all__ = ["card_errors"]

LICENSES = {
    "apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "openrail", "llama3.1", "llama3.2", "gemma",
    "other", "unknown",
}  # fmt: skip
PIPELINES = {"text-generation", "text-classification", "token-classification", "feature-extraction", "fill-mask"}
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def card_errors(content: str) -> list[str]:
    """One sentence per violation, an empty list for a valid card.

    Args:
        content (`str`): The whole README, metadata block included.

    Returns:
        `list[str]`: The violations found.

    Example:
        ```python
        card_errors("---\\nlicense: mit\\n---\\n# A model")  # []
        ```
    """
    found = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", content, re.DOTALL)
    if not found:
        return ["the card has no metadata block"]
    try:
        data = yaml.safe_load(found[1]) or {}
    except yaml.YAMLError as error:
        return [f"the metadata is not YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata is not a mapping"]
    errors = []
    if "license" in data and data["license"] not in LICENSES:
        errors.append(f'"license" must be a known identifier, got {data["license"]!r}')
    if data.get("license") == "other" and not data.get("license_name"):
        errors.append('"license_name" is required with license "other"')
    if "pipeline_tag" in data and data["pipeline_tag"] not in PIPELINES:
        errors.append(f'"pipeline_tag" must be a known task, got {data["pipeline_tag"]!r}')
    for key in ("tags", "datasets", "language"):
        values = data.get(key, [])
        values = [values] if isinstance(values, str) and key != "tags" else values
        if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
            errors.append(f'"{key}" must be a list of strings, got {values!r}')
    for key in ("base_model", "datasets"):
        values = data.get(key, [])
        for value in [values] if isinstance(values, str) else values:
            if not (isinstance(value, str) and REPO_ID.fullmatch(value)):
                errors.append(f'"{key}" must hold repository names, got {value!r}')
    if "model-index" in data:
        errors += _index_errors(data["model-index"])
    return errors


def _index_errors(index) -> list[str]:
    errors = []
    if not isinstance(index, list) or not index:
        return ['"model-index" must be a non-empty list']
    for model in index:
        if not model.get("name"):
            errors.append('"model-index[].name" is required')
        for result in model.get("results", []):
            if not (result.get("task") or {}).get("type"):
                errors.append('"results[].task.type" is required')
            dataset = result.get("dataset") or {}
            errors += [f'"results[].dataset.{key}" is required' for key in ("type", "name") if not dataset.get(key)]
            if dataset.get("type") and not REPO_ID.fullmatch(dataset["type"]):
                errors.append(f'"results[].dataset.type" must be a repository name, got {dataset["type"]!r}')
            for metric in result.get("metrics") or [{}]:
                if not metric.get("type"):
                    errors.append('"metrics[].type" is required')
                if "value" not in metric or metric["value"] is None:
                    errors.append('"metrics[].value" is required')
    return errors
