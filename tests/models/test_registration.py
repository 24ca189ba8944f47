"""Importing the package makes every type known, and whatever is called first makes its classes.

Every scenario is the first thing a process does after `import hf_moe`. One process imports the libraries and forks
into each scenario before it imports ours: a fresh interpreter each would cost most of the time of this folder.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from common.model_battery import ENCODERS, TYPES, make_config, make_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_moe.models import MODEL_TYPES, config_class
from hf_moe.registration import announce_config, load_modeling, register_config


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="scenarios fork")

# Name -> code. `folder` is a checkpoint, `model_type` and `name` its type and the name of its classes.
SCENARIOS = {
    "from_pretrained_first": """
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert type(model).__name__ == name + "ForCausalLM"
        assert model(torch.ones(1, 4, dtype=torch.int64)).logits.isfinite().all()
    """,
    "auto_config_first": """
        from transformers import AutoConfig, AutoModel
        config = AutoConfig.from_pretrained(folder)
        assert type(config).__name__ == name + "Config" and config.num_experts == 4
        assert type(AutoModel.from_config(config)).__name__ == name + "Model"
    """,
    "for_model_first": """
        from transformers import AutoConfig, AutoModelForSequenceClassification
        config = AutoConfig.for_model(model_type, num_experts=4, num_hidden_layers=1, n_layer=1)
        assert type(config).__name__ == name + "Config" and config.num_experts == 4
        from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as mapping
        assert mapping[type(config)].__name__ == name + "ForSequenceClassification"
    """,
    "pipeline_first": """
        from transformers import pipeline
        generator = pipeline("text-generation", folder, device="cpu")
        text = generator("The river", max_new_tokens=3, do_sample=False)[0]["generated_text"]
        assert text.startswith("The river") and type(generator.model).__name__ == name + "ForCausalLM"
    """,
    "classification_pipeline_first": """
        from transformers import pipeline
        classifier = pipeline("text-classification", folder, device="cpu")
        assert 0 <= classifier("The river")[0]["score"] <= 1
    """,
    "unpickled_config_first": """
        import pickle
        config = pickle.loads(open(folder + "/config.pickle", "rb").read())
        from transformers import AutoModelForCausalLM
        assert type(AutoModelForCausalLM.from_config(config)).__name__ == name + "ForCausalLM"
    """,
    "unpickled_model_first": """
        import pickle
        model = pickle.loads(open(folder + "/model.pickle", "rb").read())
        assert model(torch.ones(1, 4, dtype=torch.int64)).logits.isfinite().all()
        from transformers import AutoModelForTokenClassification
        head = AutoModelForTokenClassification.from_config(model.config)
        assert type(head).__name__ == name + "ForTokenClassification"
    """,
    "class_from_its_package_first": """
        from hf_moe.models import config_class
        import importlib
        package = importlib.import_module(config_class(model_type).__module__)
        model = getattr(package, name + "ForCausalLM").from_pretrained(folder)
        from transformers import AutoModelForCausalLM
        assert type(AutoModelForCausalLM.from_pretrained(folder)) is type(model)
    """,
    "class_from_the_top_first": """
        config = getattr(hf_moe, name + "Config")()
        assert config.model_type == model_type
        assert getattr(hf_moe, name + "ForCausalLM").config_class is type(config)
    """,
    "tokenizer_first": """
        from transformers import AutoTokenizer
        assert AutoTokenizer.from_pretrained(folder)("The river")["input_ids"]
    """,
    "encoder_first": """
        from transformers import AutoModelForMaskedLM, AutoModelForQuestionAnswering
        model = AutoModelForMaskedLM.from_pretrained(folder)
        assert type(model).__name__ == name + "ForMaskedLM"
        assert model(torch.ones(1, 4, dtype=torch.int64)).logits.isfinite().all()
        head = AutoModelForQuestionAnswering.from_config(model.config)
        assert type(head).__name__ == name + "ForQuestionAnswering"
    """,
    "several_threads_first": """
        import threading
        from transformers import AutoConfig, AutoModelForCausalLM
        start, models = threading.Barrier(4), []
        def load():
            start.wait()
            models.append(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)))
        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert len(models) == 4 and len({type(model) for model in models}) == 1
    """,
    "imported_in_the_other_order": """
        import transformers
        from transformers import AutoModelForCausalLM
        import hf_moe.models, hf_moe.routing, hf_moe.experts, hf_moe.layers
        assert type(AutoModelForCausalLM.from_pretrained(folder)).__name__ == name + "ForCausalLM"
    """,
}

RUNNER = """
import json, os, sys, textwrap, traceback, warnings
jobs = json.loads(open(sys.argv[1]).read())
import torch
torch.set_num_threads(1)
import transformers, transformers.modeling_utils, transformers.pipelines, transformers.generation.utils
import transformers.models.llama.modeling_llama
assert "hf_moe" not in sys.modules
for job in jobs:
    sys.stdout.flush(); sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 0
        try:
            warnings.simplefilter("error")
            import hf_moe
            names = {"torch": torch, "hf_moe": hf_moe, **job["names"]}
            exec(textwrap.dedent(job["code"]), names)
        except BaseException:
            code = 1
            open(job["log"], "w").write(traceback.format_exc())
        os._exit(code)
    os.waitpid(child, 0)
"""

CASES = [(scenario, "moe_llama") for scenario in SCENARIOS if scenario != "encoder_first"]
CASES += [("encoder_first", t) for t in ENCODERS]
CASES += [("from_pretrained_first", t) for t in TYPES if t != "moe_llama"] + [("unpickled_config_first", "moe_gpt2")]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, tiny_tokenizer_dir):
    """Scenario and type -> what went wrong, `None` if nothing did."""
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp("registration")
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    for model_type in (*TYPES, *ENCODERS):
        folder = root / model_type
        head = "ForMaskedLM" if model_type in ENCODERS else "ForCausalLM"
        model = make_model(model_type, head, vocab_size=384)
        model.save_pretrained(folder, code=None)
        tokenizer.save_pretrained(folder)
        (folder / "config.pickle").write_bytes(pickle.dumps(model.config))
        (folder / "model.pickle").write_bytes(pickle.dumps(model))
    jobs = []
    for scenario, model_type in CASES:
        names = {"folder": str(root / model_type), "model_type": model_type}
        names["name"] = MODEL_TYPES[model_type][1].removesuffix("Config")
        log = root / f"{scenario}-{model_type}.log"
        jobs.append({"code": SCENARIOS[scenario], "names": names, "log": str(log)})
    (root / "jobs.json").write_text(json.dumps(jobs))
    elsewhere = root / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-c", RUNNER, str(root / "jobs.json")]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere, timeout=200)
    assert answer.returncode == 0, answer.stderr[-2000:]
    logs = {case: Path(job["log"]) for case, job in zip(CASES, jobs, strict=True)}
    return {case: log.read_text() if log.is_file() else None for case, log in logs.items()}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_type_is_known_whatever_comes_first(case, outcomes):
    assert outcomes[case] is None, outcomes[case]


# -- in this process -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model_type", TYPES)
def test_every_type_has_its_own_config_and_model_classes(model_type):
    cls = config_class(model_type)
    config = make_config(model_type)
    assert cls.model_type == model_type and type(config) is cls
    assert type(AutoConfig.for_model(model_type)) is cls
    assert AutoModel._model_mapping[cls].config_class is cls
    model = AutoModelForCausalLM.from_config(config)
    assert type(model).__module__ == cls.__module__ and type(model).__name__ == cls.__name__[:-6] + "ForCausalLM"
    assert not hasattr(sys.modules[cls.__module__], "MoeNonsense")


def test_registering_twice_changes_nothing():
    cls = config_class("moe_llama")
    before = AutoModel._model_mapping[cls]
    announce_config("moe_llama", "MoeLlamaConfig", lambda: cls)
    assert type(AutoConfig.for_model("moe_llama")) is cls
    load_modeling(cls)
    assert AutoModel._model_mapping[cls] is before


def test_a_failed_import_of_model_classes_is_tried_again():
    class BrokenConfig(config_class("moe_llama")):
        model_type = "test_broken"

    calls = []

    def modeling():
        calls.append(1)
        if len(calls) == 1:
            raise ImportError("once")
        return {}

    register_config(BrokenConfig, modeling)
    with pytest.raises(ImportError, match="once"):
        load_modeling(BrokenConfig)
    load_modeling(BrokenConfig)
    load_modeling(BrokenConfig)
    assert len(calls) == 2
