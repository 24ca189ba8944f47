"""Which rows of a data set hold what: the phases of Uni-MoE choose among them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from .uni_moe_media import MEDIA, media_of


__all__ = ["check_rows", "choose_rows", "row_modalities"]


def row_modalities(dataset: Any) -> list[frozenset[str]]:
    """What each row of a data set holds beside its prompt.

    Args:
        dataset (`datasets.Dataset` or `Sequence[dict]`): Rows as [`UniMoeCollator`] reads them. Pictures and sounds
            of a `datasets.Dataset` are not decoded.

    Returns:
        `list[frozenset[str]]`: Of each row, some of `"image"`, `"video"`, `"speech"`, `"audio"`, or `"text"` alone.

    Raises:
        ValueError: a data set without length.

    Example:

    ```python
    >>> row_modalities([{"prompt": "<image>?", "completion": "A mill.", "images": [picture]}])
    [frozenset({'image'})]
    ```
    """
    kinds = []
    for counts in _counts(dataset):
        kinds.append(frozenset(MEDIA[column] for column in MEDIA if counts[column]) or frozenset({"text"}))
    return kinds


def check_rows(dataset: Any, processor: Any, modalities: Iterable[str], name: str = "train_dataset") -> None:
    """Refuses a data set that a model cannot read, before anything is trained.

    Args:
        dataset (`datasets.Dataset` or `Sequence[dict]`): The rows.
        processor ([`UniMoeProcessor`]): Of the model.
        modalities (`Iterable[str]`): What the model reads.
        name (`str`): What the data set is called in messages.

    Raises:
        ValueError: rows without prompt or completion, media for which there is no encoder, or another number of
            placeholders in a prompt than its row has media.
    """
    readable = set(modalities)
    columns = _columns(dataset)
    texts = {column: columns(column) for column in ("prompt", "completion")}
    for index, counts in enumerate(_counts(dataset)):
        for column, values in texts.items():
            if not isinstance(values[index], str):
                raise ValueError(f"`{name}`: row {index} has no string `{column}`.")
        for column, modality in MEDIA.items():
            if counts[column] and modality not in readable:
                raise ValueError(
                    f"`{name}`: row {index} has `{column}`, but the model reads {sorted(readable)} only. Leave such "
                    f"rows out, or give the model an encoder for {modality} (`upcycle_uni_moe`)."
                )
            token = getattr(processor, f"{modality}_token", None)
            found = texts["prompt"][index].count(token) if token is not None else 0
            if found != counts[column]:
                raise ValueError(
                    f"`{name}`: the prompt of row {index} has {found} placeholders {token!r}, but `{column}` has "
                    f"{counts[column]} items: write one placeholder for each."
                )


def choose_rows(dataset: Any, indices: Sequence[int]) -> Any:
    """Some rows of a data set.

    Args:
        dataset (`datasets.Dataset` or `Sequence[dict]`): The rows.
        indices (`Sequence[int]`): Which.

    Returns:
        `datasets.Dataset`, or a `torch.utils.data.Subset`.
    """
    if hasattr(dataset, "select"):
        return dataset.select(indices)
    from torch.utils.data import Subset

    return Subset(dataset, indices)


def _columns(dataset: Any) -> Any:
    if hasattr(dataset, "select_columns"):
        names = set(dataset.column_names)
        return lambda name: dataset[name] if name in names else [None] * len(dataset)
    rows = [{column: row.get(column) for column in ("prompt", "completion")} for row in _rows(dataset)]
    return lambda name: [row[name] for row in rows]


def _counts(dataset: Any) -> Iterable[Counter]:
    """How many media of each kind the rows have."""
    if hasattr(dataset, "select_columns"):
        import pyarrow.compute

        lengths: Any = pyarrow.compute.list_value_length  # type: ignore[attr-defined]  # made at run time
        counts = {}
        for column in set(MEDIA) & set(dataset.column_names):
            table = dataset.select_columns([column]).with_format("arrow")[:]
            values = table.column(column)
            if not hasattr(values.type, "value_type"):
                raise ValueError(f"`{column}` must hold a list in each row, got {values.type}.")
            counts[column] = lengths(values).fill_null(0).to_pylist()
        return [Counter({column: counts[column][i] for column in counts}) for i in range(len(dataset))]
    return [Counter({column: len(media_of(row, column)) for column in MEDIA}) for row in _rows(dataset)]


def _rows(dataset: Any) -> Iterable[Any]:
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            f"the data must have a length, got a {type(dataset).__name__}: the phases choose among its rows. Load it "
            "without streaming."
        )
    return (dataset[index] for index in range(len(dataset)))
