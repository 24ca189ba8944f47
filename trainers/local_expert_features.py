"""What a local expert and its gate need of each example, computed once: everything else trains on that."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset


__all__ = ["HeadFeatures", "HeadFeaturesDataset", "collect_features"]


class HeadFeatures(NamedTuple):
    """One row per answer of the head.

    Args:
        f (`torch.Tensor` of shape `(M, D)`): The head's input.
        q (`torch.Tensor` of shape `(M, Q)`): What the gate reads.
        z_global (`torch.Tensor` of shape `(M, C)`): Logits of the global expert.
        labels (`torch.Tensor` of shape `(M,)`): Classes.
    """

    f: torch.Tensor
    q: torch.Tensor
    z_global: torch.Tensor
    labels: torch.Tensor

    def rows(self, index: torch.Tensor) -> "HeadFeatures":
        """Those rows only."""
        return HeadFeatures(*(tensor[index] for tensor in self))

    @property
    def right(self) -> torch.Tensor:
        """`(M,)`: where the global expert is right."""
        return self.z_global.argmax(dim=-1) == self.labels


class HeadFeaturesDataset(Dataset):
    """Rows of [`HeadFeatures`] with a weight and a target each, for a `Trainer`.

    Args:
        features ([`HeadFeatures`]): The rows.
        **columns (`torch.Tensor`): More columns.
    """

    def __init__(self, features: HeadFeatures, **columns: torch.Tensor):
        self.columns = {**features._asdict(), **columns}

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def collect_features(trainer: Any, layer: Any, adapter_name: str, dataset: Any) -> HeadFeatures:
    """Runs the global expert over a data set.

    Args:
        trainer (`Trainer`): For its data loader, devices and processes.
        layer ([`~hf_moe.adapters.local_expert.LocalExpertLayer`]): The head.
        adapter_name (`str`): The adapter whose gate reads `q`.
        dataset: Rows with `labels`; -100 is left out.

    Returns:
        [`HeadFeatures`]: On the CPU, the same on every process.

    Raises:
        ValueError: A batch has no `labels`.
    """
    parts: list[HeadFeatures] = []
    model = trainer.model
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), _watch(layer, adapter_name) as seen:
            for batch in trainer.get_test_dataloader(dataset):
                batch = trainer._prepare_inputs(batch)
                labels = batch.pop("labels", None)
                if labels is None:
                    raise ValueError("Every row needs `labels`: the gate learns from who is right.")
                output = model(**batch)
                answers = output if isinstance(output, torch.Tensor) else output[0]
                part = _select(seen["f"], seen["q"], seen["z"], answers, labels)
                parts.append(HeadFeatures(*trainer.accelerator.gather_for_metrics(tuple(part))))
    finally:
        model.train(training)
    return HeadFeatures(*(torch.cat([part[i].cpu() for part in parts]) for i in range(4)))


@contextmanager
def _watch(layer: Any, adapter_name: str) -> Iterator[dict[str, torch.Tensor]]:
    """What passes the head, which answers as the global expert inside."""
    seen: dict[str, torch.Tensor] = {}

    def hook(module: Any, args: tuple, output: torch.Tensor) -> None:
        seen["f"], seen["z"] = args[0].float(), output.float()
        seen["q"] = layer.gate_features(adapter_name, args[0]).float()

    handle = layer.register_forward_hook(hook)
    layer.enable_adapters(False)
    try:
        yield seen
    finally:
        handle.remove()
        layer.enable_adapters(True)


def _select(
    f: torch.Tensor, q: torch.Tensor, z: torch.Tensor, answers: torch.Tensor, labels: torch.Tensor
) -> HeadFeatures:
    """The rows that have a label; of a head that answers at each position, the one the model's answer came from."""
    if z.ndim == 3 and labels.ndim == 1:
        position = (z == answers.float().unsqueeze(1)).all(dim=-1).int().argmax(dim=1)  # (B,)
        row = torch.arange(len(z), device=z.device)
        f, z = f[row, position], z[row, position]
        q = q[row, position] if q.ndim == 3 else q
    elif z.ndim == 3:
        f, q, z, labels = f.flatten(0, 1), q.flatten(0, 1), z.flatten(0, 1), labels.flatten()
    return HeadFeatures(f, q, z, labels).rows(labels != -100)
