"""PEFT's own tests of custom models, run with our adapter types in the place of PEFT's.

They come from its source distribution (`python tests/fetch_library_tests.py`); without it this file is skipped. What
they cannot do without a network, or suppose of LoRA only, is left out below with its reason.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from hf_moe import LocalExpertConfig, MixdaConfig, MosaConfig


CACHE = Path(__file__).resolve().parents[2] / ".cache" / "peft-tests"
MARKER = CACHE / "VERSION"
if not MARKER.is_file() or MARKER.read_text().strip() != version("peft"):
    pytest.skip(
        "the tests of this peft version are absent: run `python tests/fetch_library_tests.py`",
        allow_module_level=True,
    )
pytest.importorskip("diffusers", reason="PEFT's tests import diffusers")
sys.path.append(str(CACHE))

from peft_tests import test_custom_models as battery  # noqa: E402


pytestmark = pytest.mark.filterwarnings("default")  # PEFT runs its tests without making warnings errors

MIXDA = {"domains": ["books"], "reduction": 4, "stage": "knowledge", "gate_init_bias": 0.0}
CASES = [
    ("MLP MoSA", "MLP", MosaConfig, {"target_modules": ["lin0"], "style": "lora", "r": 4}),
    ("MLP MoSA, two targets", "MLP", MosaConfig, {"target_modules": ["lin0", "lin1"], "style": "lora", "r": 4}),
    ("MLP MixDA", "MLP", MixdaConfig, {"target_modules": ["lin0"], "mix_form": "residual", **MIXDA}),
    ("MLP local expert", "MLP", LocalExpertConfig, {"target_modules": ["lin1"], "mix": "soft"}),
]
NOT_MERGEABLE = (MixdaConfig, LocalExpertConfig)


MLP = {"expert": "mlp"}


def mixed(name, config, fields, other):
    return name, config(**fields, init_weights=False), config(**{**fields, **other}, init_weights=False)


# The decorators of PEFT's tests hold these lists themselves, so they are refilled in place.
battery.TEST_CASES[:] = CASES
battery.ALL_PEFT_CONFIG_CLASSES[:] = []
battery.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = [
    (
        "MoSA Same",
        "hfmoe_mosa",
        MosaConfig,
        {"target_modules": ["lin0"], "style": "lora", "r": 4, "init_weights": False},
        {"target_modules": ["lin0"], "style": "lora", "r": 4, "init_weights": False},
    ),
    (
        "MoSA Different",
        "hfmoe_mosa",
        MosaConfig,
        {"target_modules": ["lin0"], "style": "lora", "r": 4, "init_weights": False},
        {"target_modules": ["lin1"], "style": "lora", "r": 4, "init_weights": False},
    ),
]
battery.MIXED_ADAPTER_TEST_CASES[:] = [
    mixed("MoSA mixed adapter", MosaConfig, {"target_modules": ["lin0"], "style": "lora", "r": 4}, {"r": 2}),
    mixed("MixDA mixed adapter", MixdaConfig, {"target_modules": ["lin0"], **MIXDA}, {"reduction": 2}),
    mixed(
        "local expert mixed adapter", LocalExpertConfig, {"target_modules": ["lin1"], "mix": "soft"}, {"mix": "prob"}
    ),
]


def skip_if_merging_not_supported(model_id, config_class, config_kwargs):
    if issubclass(config_class, NOT_MERGEABLE):
        pytest.skip("its effect depends on the input")


battery._skip_if_merging_not_supported = skip_if_merging_not_supported
sys.modules["peft_tests.testing_common"]._skip_if_merging_not_supported = skip_if_merging_not_supported


LEFT_OUT = {
    "test_adding_multiple_adapters_with_bias_raises": "our configs refuse `bias` at construction",
    "test_mixed_adapter_batches_merged_raises[MixDA": "cannot be merged in the first place",
    "test_mixed_adapter_batches_merged_raises[local expert": "cannot be merged in the first place",
    "test_only_params_are_updated[MLP MoSA, two targets": "the first factor has no gradient while the second is 0",
    "test_disable_adapters[MLP MixDA": "inputs up to 89 saturate the gate, so three steps change nothing",
    "test_only_params_are_updated[MLP MixDA": "the gate's gradient is 0 while the expert's output is 0",
    **dict.fromkeys(
        (
            "test_pvera_reproducible",
            "test_multiple_adapters_seq_cls_mixed_modules_to_save_merging_adapters",
            "test_multiple_adapters_no_needless_copy_modules_to_save",
            "test_multiple_adapters_automatic_modules_to_save",
            "test_gpt2_dora_merge_and_unload",
            "test_dora_save_and_load_remapping",
            "test_delete_adapter_multiple_adapters_with_trainable_token_indices",
        ),
        "downloads a model",
    ),
}


@pytest.fixture(autouse=True)
def left_out(request):
    for name, reason in LEFT_OUT.items():
        if request.node.name.startswith(name):
            pytest.skip(reason)


class TestCustomModels(battery.TestPeftCustomModel):
    pass


class TestMultipleActiveAdapters(battery.TestMultipleActiveAdapters):
    pass


class TestMixedAdapterBatches(battery.TestMixedAdapterBatches):
    pass
