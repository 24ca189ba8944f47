"""Expert slice: trains single routed experts, and the routers that choose them, inside stacked weights."""

from hf_moe.registration import register_adapter

from .config import ExpertSliceConfig
from .layer import BankLayer, RouterLayer, SliceLayer, bypass_slices
from .model import ExpertSliceModel


__all__ = ["BankLayer", "ExpertSliceConfig", "ExpertSliceModel", "RouterLayer", "SliceLayer", "bypass_slices"]

register_adapter(ExpertSliceConfig, ExpertSliceModel)
