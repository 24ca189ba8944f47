"""The card of a trained model: valid metadata, every section only when there is something to say."""

import dataclasses
import re

import pytest
from common.card_rules import card_errors
from huggingface_hub import EvalResult, ModelCard
from transformers import MixtralConfig, MixtralForCausalLM

from hf_moe.model_cards import create_model_card
from hf_moe.models.llama import MoeLlamaConfig, MoeLlamaForCausalLM, MoeLlamaForSequenceClassification


SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture
def model():
    provenance = {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "method": "copy", "seed": 3}
    return MoeLlamaForCausalLM(MoeLlamaConfig(**SMALL, num_experts=4, upcycling=provenance))


@dataclasses.dataclass
class Report:
    max_logit_difference: float = 3.1234567e-5
    exact: bool = True
    active_parameters: int = 1_234_567


def headings(card):
    return re.findall(r"^#+ (.*)$", card.text, re.MULTILINE)


def test_a_full_card_has_every_section_and_valid_metadata(model):
    card = create_model_card(
        model,
        report=Report(),
        recipe=model.config.upcycling,
        routing_table=[{"Layer": 0, "Load max/mean": 1.23456, "Dead": 0}],
        eval_results=[
            {"metric": "Perplexity", "value": 12.3456, "dataset": "wikitext", "split": "test"},
            EvalResult(task_type="text-generation", dataset_type="me/own", dataset_name="own", metric_type="accuracy",
                       metric_value=0.5),
        ],
        training={"steps": 40, "learning_rate": 1e-4},
        figures=["some/where/expert_load.png", ("Entropy per layer", "entropy.png")],
        license="apache-2.0",
        repo_id="me/smollm2-moe",
        datasets="wikitext",
        language="en",
    )  # fmt: skip
    assert card_errors(str(card)) == []
    assert headings(card) == [
        "smollm2-moe", "Architecture", "How it was made", "Compared with the dense model", "Training", "Evaluation",
        "Routing", "How to load", "Citation",
    ]  # fmt: skip
    data = card.data.to_dict()
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data["tags"] == ["moe", "mixture-of-experts", "hf-moe", "moe-llama"]
    assert (data["license"], data["pipeline_tag"], data["library_name"]) == (
        "apache-2.0", "text-generation", "transformers",
    )  # fmt: skip
    results = data["model-index"][0]["results"]
    assert [result["metrics"][0]["value"] for result in results] == [12.3456, 0.5]
    for line in (
        "| max logit difference | 3.123e-05 |",
        "| active parameters | 1,234,567 |",
        "| 0 | 1.235 | 0 |",
        "| Perplexity | 12.35 | wikitext (test) |",
        "| learning rate | 0.0001 |",
        "| method | copy |",
        "![Expert load](expert_load.png)",
        "![Entropy per layer](entropy.png)",
        'model = AutoModelForCausalLM.from_pretrained("me/smollm2-moe")',
    ):
        assert line in card.text, line


def test_sections_without_content_are_left_out():
    card = create_model_card(MoeLlamaForCausalLM(MoeLlamaConfig(**SMALL)))
    assert headings(card) == ["MoeLlamaForCausalLM", "Architecture", "How to load", "Citation"]
    assert card_errors(str(card)) == []
    assert "\n\n\n" not in str(card)
    assert "license" not in card.data.to_dict()


def test_every_table_has_as_many_cells_as_columns(model):
    card = create_model_card(
        model, recipe={"masks | per expert": [1, 2], "note": "two\nlines"}, routing_table=[{"a|b": "c|d", "e": 1}]
    )
    lines = [line for line in card.text.splitlines() if line.startswith("|")]
    assert len(lines) > 10
    for line in lines:
        assert len(re.findall(r"(?<!\\)\|", line)) == 3, line


def test_a_local_base_model_is_named_without_its_path_and_kept_out_of_the_metadata(model, tmp_path):
    card = create_model_card(model, base_model=str(tmp_path / "dense-model"), recipe="Copied.")
    assert "base_model" not in card.data.to_dict()
    assert "made from the local checkpoint `dense-model`" in card.text
    assert str(tmp_path) not in str(card)


def test_papers_of_type_and_recipe_are_cited_once_each(model):
    card = create_model_card(
        model, recipe={"method": "drop-upcycling (2502.19261)"}, paper=["2212.05055", "2410.07524"]
    )
    assert re.findall(r"eprint = \{(.*)\}", card.text) == [
        "2212.05055", "2401.04088", "2101.03961", "2410.07524", "2502.19261",
    ]  # fmt: skip
    assert "@misc{nakamura2025dropupcycling," in card.text


def test_papers_of_the_router_and_of_the_recipe_in_the_provenance_are_cited():
    provenance = {"experts": {"name": "Drop", "rho": 0.5}, "router": {"name": "KMeans"}}
    config = MoeLlamaConfig(**SMALL, router_type="sigmoid_topk", upcycling=provenance)
    card = create_model_card(MoeLlamaForCausalLM(config))
    assert {"2412.19437", "2502.19261", "2411.15708"} <= set(re.findall(r"eprint = \{(.*)\}", card.text))
    assert "| experts | Drop(rho=0.5) |" in card.text


def test_the_report_of_upcycling_is_shown_in_its_own_words(model):
    class Told:
        def rows(self):
            return [("Function", "the same function as the dense model"), ("Parameters", "5 (3 active per token)")]

    card = create_model_card(model, report=Told())
    assert "| Function | the same function as the dense model |" in card.text
    assert "How it was made" not in headings(card)  # the report says it


def test_a_native_model_needs_no_plugin_and_its_card_says_so():
    model = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2))
    card = create_model_card(model, recipe="Copies of one feed-forward.")
    assert "import hf_moe" not in card.text
    assert "no plugin is needed" in card.text
    assert "Copies of one feed-forward." in card.text
    assert "| Experts per MoE layer | 2 |" in card.text


def test_another_head_gets_its_own_pipeline_and_loading_lines():
    card = create_model_card(MoeLlamaForSequenceClassification(MoeLlamaConfig(**SMALL, pad_token_id=0)))
    assert card.data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification.from_pretrained" in card.text


def test_a_model_that_sees_images_is_loaded_with_its_processor():
    from common.tiny_llava import moe_llava

    card = create_model_card(moe_llava())
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "AutoModelForImageTextToText, AutoProcessor\n" in card.text and "2401.15947" in card.text
    assert "AutoTokenizer" not in card.text and "processor(images=image" in card.text


def test_the_shim_is_mentioned_only_where_there_is_one(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert "`trust_remote_code=True` replaces `import hf_moe`" in create_model_card(model).text
    model.save_pretrained(tmp_path, code=None)
    assert "trust_remote_code" not in create_model_card(model).text


def test_the_loading_example_runs(model, tmp_path, tiny_tokenizer_dir, run_python):
    from transformers import AutoTokenizer

    model.resize_token_embeddings(384)
    model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(tiny_tokenizer_dir).save_pretrained(tmp_path / "saved")
    code = re.search(r"```python\n(.*?)```", create_model_card(model, repo_id="me/x").text, re.DOTALL)[1]
    result = run_python(code.replace("me/x", str(tmp_path / "saved")))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("The river")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_a_metric_without_finite_value_is_refused(model, value):
    with pytest.raises(ValueError, match="a card needs a finite number"):
        create_model_card(model, eval_results=[{"metric": "Perplexity", "value": value, "dataset": "own"}])


def test_a_metric_without_data_set_and_an_uneven_table_are_refused(model):
    with pytest.raises(ValueError, match="without `dataset`"):
        create_model_card(model, eval_results=[{"metric": "Perplexity", "value": 1.0}])
    with pytest.raises(ValueError, match=r"`routing_table` .* got \['a'\] and \['b'\]"):
        create_model_card(model, routing_table=[{"a": 1}, {"b": 1}])
    with pytest.raises(TypeError, match="`report` must be an UpcycleReport or a mapping, got int"):
        create_model_card(model, report=3)


def test_a_saved_card_can_be_read_back(model, tmp_path):
    create_model_card(model, license="mit").save(tmp_path / "README.md")
    assert ModelCard.load(tmp_path / "README.md").data.license == "mit"


def test_the_hub_accepts_the_card_and_refuses_a_broken_one(model, hub, run_python, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    code = f"""
import hf_moe
from hf_moe.model_cards import create_model_card
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "saved")!r})
result = {{"metric": "Perplexity", "value": 9.5, "dataset": "wikitext"}}
create_model_card(model, license="apache-2.0", eval_results=[result]).validate()
try:
    create_model_card(model, license="no such licence").validate()
except ValueError as error:
    print(error)
"""
    result = run_python(code, env=hub.environment(tmp_path / "home"))
    assert "license" in result.stdout, result.stderr
    assert hub.requests.count("POST /api/validate-yaml") == 2
