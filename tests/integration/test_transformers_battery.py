"""transformers' own model tests on our backbones.

They come from its source distribution (`python tests/fetch_library_tests.py`); without it this file is skipped.
By default two backbones run: a plain one and the one whose routers hand state on. The others are marked slow.
"""

import sys
import unittest
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import pytest
from common.model_battery import (
    ENCODER_HEADS,
    ENCODERS,
    GPT2_LIKE,
    HEADS,
    TYPES,
    VOCABULARY,
    make_config,
    make_inputs,
    model_class,
)


CACHE = Path(__file__).resolve().parents[2] / ".cache" / "transformers-tests"
MARKER = CACHE / "VERSION"
if not MARKER.is_file() or MARKER.read_text().strip() != version("transformers"):
    pytest.skip(
        "the tests of this transformers version are absent: run `python tests/fetch_library_tests.py`",
        allow_module_level=True,
    )
sys.path.append(str(CACHE))

from transformers.models.auto import modeling_auto  # noqa: E402
from transformers_tests import test_modeling_common as battery  # noqa: E402
from transformers_tests.test_configuration_common import ConfigTester  # noqa: E402
from transformers_tests.test_training_mixin import TrainingTesterMixin  # noqa: E402


DEFAULT = ("moe_llama", "moe_plus_plus")  # and trained, which needs a causal language model
TABLES = {
    "Model": modeling_auto.MODEL_MAPPING_NAMES,
    "ForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "ForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "ForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "ForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "ForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}


def heads_of(model_type: str) -> tuple[str, ...]:
    return ENCODER_HEADS if model_type in ENCODERS else HEADS


def get_values(table):
    """The class names of one of transformers' tables, and ours: the tests look up there what a class is for."""
    ours = [
        model_class(make_config(model_type), head).__name__
        for head, own in TABLES.items()
        if own is table
        for model_type in (*TYPES, *ENCODERS)
        if head in heads_of(model_type)
    ]
    return [*original_get_values(table), *ours]


original_get_values, battery.get_values = battery.get_values, get_values


class ModelTester:
    """What the inherited tests ask of a `model_tester`."""

    batch_size, seq_length, is_training = 3, 7, True
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, VOCABULARY
    causal_lm_class = base_model_class = None

    def __init__(self, parent, model_type: str):
        self.parent = parent
        self.model_type = model_type

    def get_config(self):
        return make_config(self.model_type, initializer_range=0.02)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), make_inputs(self.batch_size, self.seq_length)


def make_case(model_type: str) -> type:
    config = make_config(model_type)

    class Case(battery.ModelTesterMixin, unittest.TestCase):
        all_model_classes = tuple(model_class(config, head) for head in heads_of(model_type))
        test_can_init_all_missing_weights_before_2023 = True  # it looks for a year in our files
        model_tester = None

        def setUp(self):
            self.model_tester = ModelTester(self, model_type)

        def test_config(self):
            width = {"n_embd" if model_type in GPT2_LIKE else "hidden_size": 96}
            ConfigTester(self, config_class=type(config), num_experts=3, **width).run_common_tests()

        def test_moe_models_record_router_logits(self):
            # It looks for the decorator in the source of the model file; ours is where the banks are.
            with mock.patch.object(battery.inspect, "getsource", lambda module: "@use_experts_implementation"):
                super().test_moe_models_record_router_logits()

        @unittest.skip("its mixin is not in the source distribution; see tests/models/test_generation.py")
        def test_generation_tester_mixin_inheritance(self):
            pass

        @unittest.skip("refused on purpose; see tests/models/test_training.py")
        def test_training_gradient_checkpointing_use_reentrant_true(self):
            pass

    return (
        named(Case, "Test", model_type) if model_type in DEFAULT else pytest.mark.slow(named(Case, "Test", model_type))
    )


def make_training_case(model_type: str) -> type:
    @pytest.mark.slow
    class Case(TrainingTesterMixin, unittest.TestCase):
        all_model_classes = (model_class(make_config(model_type)),)
        model_tester = None

        def setUp(self):
            self.model_tester = ModelTester(self, model_type)

    return named(Case, "TestTraining", model_type)


def named(case: type, prefix: str, model_type: str) -> type:
    case.__name__ = case.__qualname__ = prefix + "".join(part.capitalize() for part in model_type.split("_"))
    case.__module__ = __name__
    return case


globals().update({case.__name__: case for case in map(make_case, (*TYPES, *ENCODERS))})
globals().update({case.__name__: case for case in map(make_training_case, DEFAULT)})
