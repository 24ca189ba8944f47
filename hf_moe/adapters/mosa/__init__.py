"""MoSA: an adapter trained as M disjoint sparse experts, of which each step draws one, and used as one plain adapter.

Paper: Mixture of Sparse Adapters for Visual Efficient Tuning, arXiv 2312.02923.
"""

from hf_moe.registration import register_adapter

from .config import MosaConfig
from .model import MosaModel, collapse_adapter


__all__ = ["MosaConfig", "MosaModel", "collapse_adapter"]

register_adapter(MosaConfig, MosaModel)
