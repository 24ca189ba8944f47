"""Feed-forwards whose two maps sit in two modules of a layer, as in BERT and its relatives."""

from torch import nn


__all__ = ["SplitFeedForward", "replaced_modules"]

FIRST, SECOND = "intermediate", "output.dense"


class SplitFeedForward(nn.Module):
    """View of the feed-forward of a layer with `intermediate` (`dense`, then the activation) and `output` (`dense`,
    then dropout, residual and norm, which are no part of the feed-forward). Its parameters are the layer's own.

    Args:
        layer (`nn.Module`): For which [`SplitFeedForward.fits`].

    Example:

    ```python
    >>> layer = BertModel(BertConfig()).encoder.layer[0]
    >>> SplitFeedForward(layer)(x)  # layer.output.dense(layer.intermediate(x))
    ```
    """

    #: Submodule of the view -> path within the layer.
    PARTS = {"fc1": f"{FIRST}.dense", "fc2": SECOND}

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.fc1 = layer.get_submodule(self.PARTS["fc1"])
        self.fc2 = layer.get_submodule(self.PARTS["fc2"])
        self.activation_fn = getattr(layer, FIRST).intermediate_act_fn

    @staticmethod
    def fits(layer: nn.Module) -> bool:
        """Whether a layer has this layout."""
        first = getattr(layer, FIRST, None)
        up, down = getattr(first, "dense", None), getattr(getattr(layer, "output", None), "dense", None)
        if not (isinstance(first, nn.Module) and isinstance(up, nn.Linear) and isinstance(down, nn.Linear)):
            return False
        alone = {id(p) for p in first.parameters()} == {id(p) for p in up.parameters()}
        return alone and hasattr(first, "intermediate_act_fn") and down.in_features == up.out_features

    def forward(self, hidden_states):
        """`(..., D) -> (..., D)`."""
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


def replaced_modules(name: str) -> tuple[str, ...]:
    """Paths of the dense modules that go when the feed-forward called `name` becomes a MoE block."""
    layer, _, last = name.rpartition(".")
    return (name, f"{layer}.{SECOND}") if last == FIRST else (name,)
