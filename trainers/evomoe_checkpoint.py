"""The checkpoint between the two phases of EvoMoE: that of phase 1, with other experts."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from hf_moe.files import new_folder, write_text
from hf_moe.routing.steps import ROUTER_STATE_NAME
from hf_moe.upcycling import expand_experts


__all__ = ["checkpoint_step", "write_expanded"]

# What is written anew, or means nothing to another number of experts.
NOT_COPIED = (TRAINER_STATE_NAME, TRAINING_ARGS_NAME, ROUTER_STATE_NAME, "config.json", "generation_config.json")


def checkpoint_step(folder: str) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(Path(folder).name.rpartition("-")[2])


def write_expanded(model_class: type[PreTrainedModel], source: str, destination: Path, args: Any) -> None:
    """Copies a checkpoint with every expert expanded, so that a Trainer resumes from it.

    The optimizer's file is copied as it is: its moments are expanded when they have been loaded.

    Args:
        model_class (`type`): Class of the model.
        source (`str`): Checkpoint of phase 1.
        destination (`Path`): Folder to write; there whole or not at all.
        args ([`EvoMoEArguments`]): What the experts and the gate are to be.
    """
    expanded = expand_experts(
        model_class.from_pretrained(source, dtype="auto"),
        args.num_experts,
        diversify=args.diversify,
        rate=args.diversify_rate,
        sigma=args.diversify_sigma,
        seed=args.seed,
        router=args.gate_start,
        **args.router_fields(),
    )
    with new_folder(destination) as partial:
        expanded.save_pretrained(partial)
        for path in Path(source).iterdir():
            is_weights = path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json")
            if (
                path.is_file()
                and not is_weights
                and path.name not in NOT_COPIED
                and not (partial / path.name).exists()
            ):
                shutil.copyfile(path, partial / path.name)
        state = json.loads((Path(source) / TRAINER_STATE_NAME).read_text())
        # The best model of phase 1 has other shapes.
        state |= {"best_metric": None, "best_model_checkpoint": None, "best_global_step": None}
        write_text(partial / TRAINER_STATE_NAME, json.dumps(state, indent=2) + "\n")
