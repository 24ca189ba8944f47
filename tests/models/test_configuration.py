"""Bad configs are refused when they are made, in one sentence that names the field, its value and what is allowed."""

import json

import pytest
from common.model_battery import ENCODERS, GPT2_LIKE, TYPES, make_config, make_model
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from hf_moe.models.configuration import parse_moe_layers


every_type = pytest.mark.parametrize("model_type", TYPES)
every_config = pytest.mark.parametrize("model_type", [*TYPES, *ENCODERS])
LAYERS = "must be 'all', 'every:<step>', 'first_half', 'second_half' or a list of layer indices, got"
BAD = [
    (
        {"router_type": "softmax_tpok"},
        r"`router_type='softmax_tpok'` .*Choose one of \[.*Did you mean 'softmax_topk'\?",
    ),
    ({"expert_type": "swiglo"}, r"`expert_type='swiglo'` .*Choose one of \[.*Did you mean 'swiglu'\?"),
    ({"router_config": {"nosie": "jitter"}, "router_type": "softmax_topk"}, r"has 'nosie', .*Did you mean 'noise'\?"),
    ({"num_experts_per_tok": 9}, r"`num_experts_per_tok` must be between 1 and the number of experts \(\d+\), got 9"),
    ({"num_experts_per_tok": 0}, r"`num_experts_per_tok` must be between 1 and .* got 0"),
    ({"num_experts": 0}, "`num_experts` must be at least 1, got 0"),
    ({"num_shared_experts": -1}, "`num_shared_experts` must not be negative, got -1"),
    ({"num_zero_experts": -2}, "`num_zero_experts` must not be negative, got -2"),
    ({"num_copy_experts": -2}, "`num_copy_experts` must not be negative, got -2"),
    ({"num_constant_experts": -2}, "`num_constant_experts` must not be negative, got -2"),
    ({"moe_layers": [0, 2]}, r"`moe_layers` has \[2\], but the model has 2 layers: use indices from 0 to 1"),
    ({"moe_layers": [-1]}, r"`moe_layers` has \[-1\], but the model has 2 layers"),
    ({"moe_layers": [1, 1]}, r"`moe_layers` names a layer twice: \[1, 1\]"),
    ({"moe_layers": []}, r"`moe_layers=\[\]` selects none of the 2 layers"),
    ({"moe_layers": "every:3"}, "`moe_layers='every:3'` selects none of the 2 layers"),
    ({"moe_layers": "every:0"}, f"`moe_layers` {LAYERS} 'every:0'"),
    ({"moe_layers": "every:x"}, f"`moe_layers` {LAYERS} 'every:x'"),
    ({"moe_layers": "some"}, f"`moe_layers` {LAYERS} 'some'"),
    ({"moe_intermediate_size": 0}, "`moe_intermediate_size` must be at least 1, got 0"),
    ({"shared_expert_intermediate_size": 0}, "`shared_expert_intermediate_size` must be at least 1, got 0"),
    ({"expert_capacity_factor": 0}, "`expert_capacity_factor` must be above 0, or None to drop nothing, got 0"),
    ({"expert_capacity_factor": float("nan")}, "`expert_capacity_factor` must be above 0, .* got nan"),
    ({"router_tau": 0.0}, "`router_tau` must be above 0 and finite, got 0.0"),
    ({"router_tau": float("inf")}, "`router_tau` must be above 0 and finite, got inf"),
    ({"router_aux_loss_coef": -0.1}, "`router_aux_loss_coef` must be at least 0 and finite, got -0.1"),
    ({"router_aux_loss_coef": float("nan")}, "`router_aux_loss_coef` must be at least 0 and finite, got nan"),
    ({"router_z_loss_coef": -1}, "`router_z_loss_coef` must be at least 0 and finite, got -1"),
    ({"router_bias_update_speed": -1}, "`router_bias_update_speed` must be at least 0, got -1"),
    ({"balance_mode": "global"}, r"`balance_mode` must be one of \['micro', .*'blend'\], got 'global'"),
    ({"balance_local_fraction": 1.5}, "`balance_local_fraction` must be between 0 and 1, got 1.5"),
    ({"per_layer_config": {1: {"num_experts": 2}}}, "`per_layer_config` is not supported by .* `moe_layers`"),
]


@every_config
@pytest.mark.parametrize(("fields", "message"), BAD, ids=[str(fields) for fields, _ in BAD])
def test_bad_values_are_refused(model_type, fields, message):
    with pytest.raises(ValueError, match=message):
        make_config(model_type, **fields)


@pytest.mark.parametrize(
    "fields",
    [{"num_experts": "8"}, {"moe_layers": [0, "1"]}, {"router_config": None}, {"num_experts_per_tok": 2.0}],
    ids=str,
)
def test_values_of_the_wrong_type_are_refused_by_name(fields):
    with pytest.raises(
        StrictDataclassFieldValidationError, match=f"Validation error for field '{next(iter(fields))}'"
    ):
        make_config("moe_llama", **fields)


@every_config
def test_a_bad_config_file_is_refused_alike(model_type, tmp_path):
    make_config(model_type).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "router_type": "unheard_of"}))
    with pytest.raises(ValueError, match="`router_type='unheard_of'` is not a known router"):
        AutoConfig.from_pretrained(tmp_path)


@every_config
def test_a_field_made_bad_later_is_refused_when_saved(model_type, tmp_path):
    config = make_config(model_type)
    config.num_experts_per_tok = 99
    with pytest.raises(Exception, match="`num_experts_per_tok` must be between 1 and"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


@every_type
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts_per_tok": 99}, "`num_experts_per_tok` must be between 1 and .* got 99"),
        ({"router_config": {"x": 1}}, "`router_config` has 'x', which router .* does not know"),
        ({"moe_layers": [7]}, r"`moe_layers` has \[7\], but the model has 2 layers"),
    ],
    ids=str,
)
def test_bad_values_given_while_loading_are_refused_when_the_model_is_made(model_type, fields, message, tmp_path):
    make_config(model_type).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path, **fields))


def test_cross_attention_is_refused():
    with pytest.raises(ValueError, match="`add_cross_attention` must be False: `moe_gpt2` is decoder-only"):
        make_config("moe_gpt2", add_cross_attention=True)


# -- what is derived -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("moe_layers", "layers", "expected"),
    [
        ("all", 3, [0, 1, 2]),
        ("every:1", 3, [0, 1, 2]),
        ("every:2", 5, [1, 3]),
        ("every:3", 3, [2]),
        ("first_half", 5, [0, 1]),
        ("second_half", 5, [2, 3, 4]),
        ([2, 0], 3, [0, 2]),
    ],
    ids=str,
)
def test_moe_layers_are_parsed(moe_layers, layers, expected):
    assert parse_moe_layers(moe_layers, layers) == expected


@every_type
def test_sizes_default_to_the_dense_models(model_type):
    config = make_config(model_type)
    assert config.moe_intermediate_size == config.shared_expert_intermediate_size == config.intermediate_width == 48
    assert config.expert_type == ("mlp_bias" if model_type in (*GPT2_LIKE, "moe_phi") else "swiglu")
    assert config.num_local_experts == config.num_experts == 4  # the two names libraries read
    assert config.num_routing_targets == 4 + config.num_zero_computation_experts
    assert make_config(model_type, moe_intermediate_size=16).shared_expert_intermediate_size == 16


def test_llama_with_biases_gets_experts_with_biases():
    assert make_config("moe_llama", mlp_bias=True).expert_type == "swiglu_bias"


@every_config
def test_configs_do_not_share_their_containers(model_type):
    one, other = make_config(model_type), make_config(model_type)
    one.router_config["temperature"] = 2.0
    one.auto_map["AutoConfig"] = "x"
    assert "temperature" not in other.router_config and other.auto_map == {}


@pytest.mark.parametrize("width", [20, 30])
def test_widths_that_grouped_mm_cannot_run_get_another_implementation(width):
    assert make_model("moe_llama", moe_intermediate_size=width).config._experts_implementation == "eager"
    with pytest.raises(ValueError, match=rf"needs `moe_intermediate_size` to be a multiple of 8, got {width}"):
        make_model("moe_llama", moe_intermediate_size=width, implementation={"experts_implementation": "grouped_mm"})
    model = make_model("moe_llama", moe_intermediate_size=width)
    with pytest.raises(ValueError, match=r'Use "batched_mm" or "eager"'):
        model.set_experts_implementation("grouped_mm")
    model.set_experts_implementation("batched_mm")


# -- parallel plans --------------------------------------------------------------------------------------------------
@every_type
def test_parallel_plans_name_what_the_model_has(model_type):
    fields = {"num_shared_experts": 1, "residual_expert": True}
    for expert_type in ("swiglu", "mlp", "swiglu_bias", "mlp_bias"):
        config = make_config(model_type, expert_type=expert_type, **fields)
        model = make_model(model_type, "Model", expert_type=expert_type, **fields)
        prefix = config.moe_block_path.replace("*", "0")
        names = dict(model.named_parameters()) | dict(model.named_modules())
        for plan in (config.base_model_tp_plan or {}, config.base_model_ep_plan):
            ours = {name.replace("*", "0") for name in plan if name.startswith(config.moe_block_path)}
            assert ours <= names.keys(), ours - names.keys()
        ep = {name.replace("*", "0") for name in config.base_model_ep_plan}
        assert {name for name in names if name.startswith(f"{prefix}.experts")} - {f"{prefix}.experts.act_fn"} == ep


def test_dense_layers_keep_their_tensor_parallel_rules():
    mixed, full = make_config("moe_llama", moe_layers=[1]), make_config("moe_llama")
    assert "layers.*.mlp.gate_proj" in mixed.base_model_tp_plan
    assert "layers.*.mlp.gate_proj" not in full.base_model_tp_plan
    assert "layers.*.self_attn.q_proj" in full.base_model_tp_plan
