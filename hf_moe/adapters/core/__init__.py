"""What all adapter types share: a config, a layer that holds cells beside a base module, a tuner, runtime inputs."""

from .bottleneck import Bottleneck
from .bypass import bypass
from .config import MoeAdapterConfig
from .float32_buffers import Float32Buffers
from .layer import BlockLayer, CellLayer
from .parameter import ParameterLayer
from .runtime import Runtime, condition, install_runtime, runtime_of
from .tuner import CellTuner


__all__ = [
    "BlockLayer",
    "Bottleneck",
    "CellLayer",
    "CellTuner",
    "Float32Buffers",
    "MoeAdapterConfig",
    "ParameterLayer",
    "Runtime",
    "bypass",
    "condition",
    "install_runtime",
    "runtime_of",
]
