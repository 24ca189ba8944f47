"""A random checkpoint in the layout of the released MoE-LLaVA, its gate written down again, and the converter."""

import copy
import json

import pytest
import torch
from common.tiny_llava import dense_llava, images, make_processor
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_moe import cli
from hf_moe.models.moe_llava.convert_released import convert_released
from hf_moe.models.moe_llava.released_config import released_text_config


LAYERS, EXPERTS = [0, 2], 3
MOE = {
    "moe_enable": True,
    "moe_mode": "sparse",
    "moe_layers_idx": LAYERS,
    "num_experts": [EXPERTS, EXPERTS],
    "top_k_experts": 2,
    "capacity_factor": 1.5,
    "eval_capacity_factor": 2.0,
    "min_capacity": 0,
    "use_residual": False,
    "router_aux_loss_coef": 0.01,
    "train_modules": ["wg"],
}
KINDS = {"stablelm": "moe_llava_stablelm", "phi": "moe_llava_phi", "qwen2": "moe_llava_qwen1_5",
         "llama": "moe_llava_llama"}  # fmt: skip


class Gate(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.wg = nn.Linear(size, EXPERTS, bias=False)


class Experts(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.deepspeed_experts = nn.ModuleList(copy.deepcopy(mlp) for _ in range(EXPERTS))


class Mixture(nn.Module):
    """DeepSpeed's layer at evaluation, without capacity and noise: top-1 weighed by p, top-2 by p / sum p."""

    def __init__(self, mlp, size, top_k, residual):
        super().__init__()
        self.deepspeed_moe = nn.Module()
        self.deepspeed_moe.gate, self.deepspeed_moe.experts = Gate(size), Experts(mlp)
        self.top_k = top_k
        self.mlp = copy.deepcopy(mlp) if residual else None
        self.coefficient = nn.Linear(size, 2) if residual else None

    def forward(self, x):
        p = self.deepspeed_moe.gate.wg(x.float()).softmax(-1)
        weights, index = p.topk(self.top_k)
        if self.top_k == 2:
            weights = weights / weights.sum(-1, keepdim=True)
        outputs = torch.stack([expert(x) for expert in self.deepspeed_moe.experts.deepspeed_experts], dim=-2)
        chosen = outputs.gather(-2, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))
        output = (weights.unsqueeze(-1) * chosen).sum(-2)
        if self.mlp is not None:
            c = self.coefficient(x).softmax(-1)
            output = output * c[..., :1] + self.mlp(x) * c[..., 1:]
        return output


def released_name(name):
    for ours, theirs in (
        ("model.language_model.", "model."),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.image_spatial_proj.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.image_spatial_proj.2."),
        ("model.vision_tower.", "model.image_tower.image_tower.vision_model."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def release(folder, tokenizer, text_type="stablelm", vocabulary=None, with_tower=True, binary=False, **moe):
    """Writes a release and its tower; returns the model it was made of."""
    moe = {**MOE, **moe}
    model = dense_llava(text_type, vocab_size=vocabulary or len(tokenizer) + 5)
    text = model.config.text_config
    torch.manual_seed(0)
    for layer in LAYERS:
        block = model.model.language_model.layers[layer]
        block.mlp = Mixture(block.mlp, text.hidden_size, moe["top_k_experts"], moe["use_residual"])
    if text_type == "phi":
        model.lm_head = nn.Linear(text.hidden_size, text.vocab_size)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".mlp." in name or "lm_head" in name:
            nn.init.normal_(parameter, std=0.3, generator=generator)
    state = {released_name(name): value.contiguous() for name, value in model.state_dict().items()}
    if not with_tower:
        state = {name: value for name, value in state.items() if "image_tower" not in name}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    state |= (
        {"model.image_tower.image_tower.vision_model.embeddings.position_ids": torch.arange(5)} if with_tower else {}
    )
    tower = folder / "tower"
    model.model.vision_tower.save_pretrained(tower)
    config = {
        **{name: value for name, value in text.to_dict().items() if name not in ("rope_parameters", "layer_norm_eps")},
        **{"model_type": KINDS[text_type], "moe": moe, "mm_image_tower": str(tower), "mm_hidden_size": 16},
        **{"image_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"},
    }
    rotary = text.rope_parameters
    if text_type == "stablelm":
        config |= {"rope_pct": rotary["partial_rotary_factor"], "norm_eps": text.layer_norm_eps}
    elif text_type == "phi":
        config |= {"partial_rotary_factor": rotary["partial_rotary_factor"], "layer_norm_eps": text.layer_norm_eps}
    source = folder / "released"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(source)
    if binary:
        torch.save(state, source / "pytorch_model.bin")
    else:
        save_file(state, source / "model.safetensors")
    return model.eval()


@torch.no_grad()
def compare(folder, reference):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
    processor = AutoProcessor.from_pretrained(folder)
    batch = processor(images=images(2), text=["<image>the river", "a mill <image>"], padding=True, return_tensors="pt")
    reference.config.image_token_index = model.config.image_token_index
    if model.config.image_token_index >= reference.config.text_config.vocab_size:
        reference.resize_token_embeddings(model.config.text_config.vocab_size)
    known = reference.config.text_config.vocab_size
    real = batch["attention_mask"].bool()
    got, expected = model(**batch).logits[real], reference(**batch).logits[real]
    torch.testing.assert_close(got[:, : known - 64], expected[:, : known - 64], rtol=1e-4, atol=1e-4)
    return model


@pytest.mark.parametrize("text_type", KINDS)
@pytest.mark.parametrize("moe", [{}, {"use_residual": True}, {"top_k_experts": 1}], ids=str)
def test_the_converted_model_computes_what_was_released(text_type, moe, tmp_path, tiny_tokenizer):
    reference = release(tmp_path, tiny_tokenizer, text_type, **moe)
    folder = convert_released(tmp_path / "released", tmp_path / "ours")
    config = compare(folder, reference).config
    assert config.moe_layer_indices == LAYERS and config.num_experts == EXPERTS
    assert config.num_experts_per_tok == moe.get("top_k_experts", 2)
    assert config.router_aux_loss_coef == 0.02 and config.expert_capacity_factor == 1.5
    assert config.image_token_index == len(tiny_tokenizer)  # a spare row of the embedding


def test_a_tower_that_was_not_saved_is_taken_from_where_it_is_named(tmp_path, tiny_tokenizer):
    reference = release(tmp_path, tiny_tokenizer, with_tower=False, binary=True)
    compare(convert_released(tmp_path / "released", tmp_path / "ours"), reference)


def test_a_vocabulary_without_a_spare_row_grows(tmp_path, tiny_tokenizer):
    reference = release(tmp_path, tiny_tokenizer, "phi", vocabulary=len(tiny_tokenizer))
    model = compare(convert_released(tmp_path / "released", tmp_path / "ours"), copy.deepcopy(reference))
    rows = model.get_input_embeddings().weight
    assert model.config.image_token_index == len(tiny_tokenizer) and rows.shape[0] % 64 == 0
    known = reference.get_input_embeddings().weight
    torch.testing.assert_close(rows[len(tiny_tokenizer)], known.mean(0))
    assert model.lm_head.bias.shape == rows.shape[:1]


def test_numbers_of_experts_may_differ_between_layers(tiny_tokenizer):
    config = {"model_type": "moe_llava_phi", "mm_image_tower": "x", "vocab_size": 9, "hidden_size": 8,
              "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 1}  # fmt: skip
    fields = released_text_config({**config, "moe": {**MOE, "num_experts": [2, 4]}})
    assert fields["num_experts"] == [2, 4] and fields["moe_layers"] == LAYERS
    assert fields["rope_parameters"]["partial_rotary_factor"] == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "moe_llava_qwen"}, r"its language model, Qwen-1, has no backbone here"),
        ({"model_type": "llava_phi"}, r"`model_type` 'llava_phi'.*an entry `moe`"),
        ({"moe": {"moe_enable": True}}, r"an entry `moe` with `moe_layers_idx`"),
        ({"mm_video_tower": "LanguageBind"}, r"`mm_video_tower='LanguageBind'` is not supported"),
        ({"image_projector_type": "qformer2_6"}, r"`image_projector_type='qformer2_6'` is not supported"),
        ({"hidden_size": None}, r"`hidden_size` is missing"),
        ({"num_hidden_layers": 4}, r"lacks \d+ tensors of the released layout.*`model\.layers\.3\."),
        ({"num_hidden_layers": 3, "moe": {**MOE, "moe_layers_idx": [0], "num_experts": [3]}}, r"`model\.layers\.2\."),
    ],
)
def test_what_is_no_release_is_refused_and_nothing_is_written(change, message, tmp_path, tiny_tokenizer):
    release(tmp_path, tiny_tokenizer)
    path = tmp_path / "released" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        convert_released(tmp_path / "released", tmp_path / "ours")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["released", "tower"]


def test_a_tokenizer_with_code_of_its_own_has_to_be_given(tmp_path, tiny_tokenizer):
    reference = release(tmp_path, tiny_tokenizer)
    for path in (tmp_path / "released").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"no tokenizer could be loaded.*Pass `tokenizer`"):
        convert_released(tmp_path / "released", tmp_path / "ours")
    tiny_tokenizer.save_pretrained(tmp_path / "words")
    compare(convert_released(tmp_path / "released", tmp_path / "ours", tokenizer=tmp_path / "words"), reference)


def test_the_command_knows_the_layout(tmp_path, tiny_tokenizer):
    release(tmp_path, tiny_tokenizer)
    assert cli.main(["convert", "moe-llava", str(tmp_path / "released"), str(tmp_path / "ours")]) == 0
    assert type(AutoProcessor.from_pretrained(tmp_path / "ours")).__name__ == "LlavaProcessor"
    assert len(make_processor(tiny_tokenizer).tokenizer) == len(
        AutoProcessor.from_pretrained(tmp_path / "ours").tokenizer
    )
