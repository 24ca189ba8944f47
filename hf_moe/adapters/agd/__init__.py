"""AGD: adapters on a frozen diffusion model that reproduce classifier-free guidance in one forward pass.

Paper: https://huggingface.co/papers/2503.07274
"""

from hf_moe.registration import register_adapter

from .checkpoint import load_agd, save_agd, unload_agd
from .config import AgdConfig
from .dataset import AgdDataset
from .guidance import agd_disabled, agd_guidance, guidance_free, set_condition_fn, set_guidance
from .model import AgdModel
from .pipelines import PipelineSampler
from .sampling import DenoisingLoop, GuidedStep, guided
from .sites import REFERENCE_SITES
from .trajectories import record_trajectories


__all__ = [
    "REFERENCE_SITES",
    "AgdConfig",
    "AgdDataset",
    "AgdModel",
    "DenoisingLoop",
    "GuidedStep",
    "PipelineSampler",
    "agd_disabled",
    "agd_guidance",
    "guidance_free",
    "guided",
    "load_agd",
    "record_trajectories",
    "save_agd",
    "set_condition_fn",
    "set_guidance",
    "unload_agd",
]

register_adapter(AgdConfig, AgdModel)
