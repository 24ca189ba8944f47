"""Adapter types that PEFT knows after `import hf_moe`: one folder per type, all of them on the shared `core`."""

import importlib

from hf_moe.lazy import lazy_exports


# A new type: its folder, whose `__init__` ends with `register_adapter(...)`, and its line here.
ADAPTER_FOLDERS: tuple[str, ...] = (
    "agd",
    "expert_slice",
    "local_expert",
    "mixda",
    "mosa",
    "pill",
)

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "AgdConfig": ".agd",
        "AgdModel": ".agd",
        "ExpertSliceConfig": ".expert_slice",
        "ExpertSliceModel": ".expert_slice",
        "LocalExpertConfig": ".local_expert",
        "LocalExpertModel": ".local_expert",
        "MixdaConfig": ".mixda",
        "MixdaModel": ".mixda",
        "MosaConfig": ".mosa",
        "MosaModel": ".mosa",
        "PillConfig": ".pill",
        "PillModel": ".pill",
    },
)


def register_all() -> None:
    """Imports every folder; each one registers itself in its `__init__`.

    Runs when PEFT has been imported. A folder that is being imported right now (its import is what brought PEFT) is
    left to finish by itself.
    """
    for folder in ADAPTER_FOLDERS:
        importlib.import_module(f"{__name__}.{folder}")


def config_classes() -> list[type]:
    """The config class of every adapter type, for lists and tests.

    Returns:
        `list[type]`: In the order of `ADAPTER_FOLDERS`.
    """
    modules = (importlib.import_module(f"{__name__}.{folder}") for folder in ADAPTER_FOLDERS)
    found = []
    for module in modules:
        members = (getattr(module, name) for name in module.__all__)
        found += [member for member in members if isinstance(member, type) and hasattr(member, "type_name")]
    return found


# Last: importing PEFT registers the types, whose folders import what `core` holds. Were PEFT first imported from
# within `core`, they would find it half made.
importlib.import_module("peft")
