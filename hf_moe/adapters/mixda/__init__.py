"""MixDA: domain adapters beside a frozen feed-forward network and a gate that mixes them with it (2306.05406)."""

from hf_moe.registration import register_adapter

from .cells import DomainGate, mix
from .config import MixdaConfig
from .layer import MixdaLayer
from .model import MixdaModel
from .recording import GateRecorder, KnowledgeRecorder, record_gates, record_knowledge, sampling_loss
from .sources import DomainSource, DomainSources


__all__ = [
    "DomainGate",
    "DomainSource",
    "DomainSources",
    "GateRecorder",
    "KnowledgeRecorder",
    "MixdaConfig",
    "MixdaLayer",
    "MixdaModel",
    "mix",
    "record_gates",
    "record_knowledge",
    "sampling_loss",
]

register_adapter(MixdaConfig, MixdaModel)
