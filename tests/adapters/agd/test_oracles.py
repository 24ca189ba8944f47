"""What guidance in one pass must satisfy exactly: the formula, the start, the scale's shapes, the sites, the sizes."""

import pytest
import torch
from common.tiny_denoisers import PlainDenoiser, latents, tiny_dit, tiny_sd3, tiny_unet
from peft import get_peft_model
from torch import nn

from hf_moe import AgdConfig
from hf_moe.adapters.agd import REFERENCE_SITES, agd_disabled, agd_guidance, guided, set_condition_fn, set_guidance
from hf_moe.adapters.agd.cells import CrossAttentionCell, OffsetCell
from hf_moe.adapters.agd.encoders import FourierFeatures
from hf_moe.adapters.agd.layer import AgdLayer


E_U, E_C = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 0.0]])
X, T, C = latents(3, (4, 6)), torch.tensor([10, 400, 999]), torch.tensor([0, 1, 4])
PLAIN = {"target_modules": ["attn"], "hidden_size": 8, "condition_modules": {"class": "label"}}
PLAIN |= {"condition_on": ("scale", "timestep", "class")}
ARCHITECTURES = ("offset", "cross_attention")


def plain(architecture="offset", net=None, **fields):
    net = net or PlainDenoiser()
    torch.manual_seed(0)
    return get_peft_model(
        net, AgdConfig(architecture=architecture, **({"init_weights": False} | PLAIN | fields))
    ).eval()


def run(model, scale=3.0, x=X, t=T, c=C):
    with torch.no_grad(), agd_guidance(model, scale):
        return model(x, t, c)


def resolved(**fields):
    return AgdConfig(**({"hidden_size": 8, "init_weights": False, "condition_on": ("scale",)} | fields))


@pytest.mark.parametrize(("w", "expected"), [(4.0, [9, 6]), (7.5, [16, 13]), (1.0, [3, 0]), (0.0, [1, -2])])
def test_guidance_extrapolates_from_the_unconditional_prediction(w, expected):
    assert torch.equal(guided(E_U, E_C, w), torch.tensor([expected], dtype=torch.float32))
    both = guided(E_U.expand(2, -1), E_C.expand(2, -1), torch.tensor([[w], [1.0]]))
    assert both.tolist() == [expected, [3.0, 0.0]]


@pytest.mark.parametrize(("w", "loss"), [(1.0, 0.0), (0.0, 4.0), (4.0, 36.0), (7.5, 169.0)])
def test_the_first_loss_is_what_guidance_changes(w, loss):
    assert (guided(E_U, E_C, w) - E_C).square().mean().item() == loss == (w - 1) ** 2 * 4.0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_adapter_is_the_base_at_any_scale(architecture):
    net = PlainDenoiser()
    with torch.no_grad():
        expected = net(X, T, C)
    model = plain(architecture, net, init_weights=True)
    for scale in (0.0, 1.0, 7.5, torch.tensor([1.0, 2.0, 3.0])):
        assert torch.equal(run(model, scale), expected)
    assert not torch.equal(run(plain(architecture, zero_init=False, init_weights=True)), expected)


def test_an_offset_learns_the_guidance_of_an_affine_denoiser_exactly():
    # eps = A x + B c: guidance adds (w - 1) B c, whatever x is
    class Affine(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.Linear(6, 6)
            self.label = nn.Embedding(4, 6, _weight=torch.tensor([[1.0] * 6, [-1.0] * 6, [0.5, -0.5] * 3, [0.0] * 6]))

        def forward(self, x, t, c):
            return self.attn(x) + self.label(c)

    torch.manual_seed(0)
    net = Affine()
    c = torch.randint(0, 3, (64,))
    x, w = torch.randn(64, 6), 1 + 5 * torch.rand(64)
    with torch.no_grad():
        e_c, e_u = net(x, None, c), net(x, None, torch.full((64,), 3))
    torch.testing.assert_close(guided(e_u, e_c, w), e_c + (w - 1)[:, None] * net.label(c))
    cell = OffsetCell(
        resolved(condition_on=("scale", "class"), condition_sizes={"class": 6}, hidden_size=16), in_size=6, out_size=6
    )
    optimizer = torch.optim.Adam(cell.parameters(), lr=1e-2)
    for _ in range(300):
        added = cell(x, w, {"class": net.label(c).detach()})
        loss = (e_c + added - guided(e_u, e_c, w)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.01 * (guided(e_u, e_c, w) - e_c).square().mean()


@pytest.mark.parametrize("cell", [OffsetCell, CrossAttentionCell])
def test_tokens_differ_only_under_cross_attention_to_several_keys(cell):
    torch.manual_seed(0)
    x, w, embedding = torch.randn(2, 5, 6), torch.tensor([2.0, 4.0]), torch.randn(2, 3)

    def spread(**fields):
        names = tuple(fields.get("condition_sizes", {}))
        added = cell(resolved(condition_on=("scale", *names), **fields), 6, 6)(x, w, dict.fromkeys(names, embedding))
        added = added.expand(2, 5, 6)
        return (added - added[:, :1]).abs().max().item()

    assert spread() < 1e-6
    two_keys = spread(condition_sizes={"timestep": 3})
    assert two_keys == 0 if cell is OffsetCell else two_keys > 1e-3


def test_features_of_near_scales_are_alike_as_their_distance_says():
    torch.manual_seed(0)
    for s, d, expected in ((1, 0.05, 0.952), (1, 0.1, 0.821), (1, 0.3, 0.169), (10, 0.3, 0.0), (1000, 0.1, 0.0)):
        features = FourierFeatures(200_000, s)(torch.tensor([3.0, 3.0 + d]))
        cosine = nn.functional.cosine_similarity(features[0], features[1], dim=0).item()
        assert cosine == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("s", [1.0, 1000.0])
def test_fourier_buffers_stay_float32(s):
    torch.manual_seed(0)
    features = FourierFeatures(64, s)
    expected = features(torch.tensor([3.3]))
    kept = features.frequencies.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(features(torch.tensor([3.3])), expected)
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()):
        cast(features)
        assert features.frequencies.dtype == torch.float32 and torch.equal(features.frequencies, kept)
        assert torch.equal(features(torch.tensor([3.3])), expected)
    rounded = torch.cos(2 * torch.pi * (features.frequencies.bfloat16().float() * 3.3 * s + features.phases))
    assert (rounded - expected).abs().max() > 0.02  # what the rounding would do
    model = plain().to(torch.bfloat16)
    assert run(model, x=X.bfloat16()).dtype == torch.bfloat16
    buffers = dict(model.named_buffers())
    assert buffers and all(buffer.dtype == torch.float32 for buffer in buffers.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scalars_and_columns_agree_and_rows_do_not_see_each_other(architecture):
    model = plain(architecture)
    expected = run(model, 3.0)
    for scale in (torch.tensor(3.0), torch.full((1,), 3.0), torch.full((3,), 3.0), torch.full((3, 1), 3.0)):
        assert torch.equal(run(model, scale), expected)
    scales = torch.tensor([1.5, 3.0, 6.0])
    together = run(model, scales)
    assert not torch.allclose(together[0], expected[0])
    for row in range(3):
        alone = run(model, scales[row].item(), X[row : row + 1], T[row : row + 1], C[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], rtol=1e-5, atol=1e-5)


def test_a_missing_or_misshapen_scale_is_an_error():
    model = plain()
    with pytest.raises(ValueError, match="needs a guidance scale"), torch.no_grad():
        model(X, T, C)
    for scale in (torch.ones(2), torch.ones(3, 2), torch.ones(1, 1, 3)):
        with pytest.raises(ValueError, match="agd_scale"):
            run(model, scale)
    with pytest.raises(ValueError, match="no AGD adapter"), agd_guidance(PlainDenoiser(), 1.0):
        pass


def test_the_scale_comes_from_context_setting_or_call():
    model = plain()
    expected = run(model, 3.0)
    model.set_guidance(3.0)
    with torch.no_grad():
        assert torch.equal(model(X, T, C), expected)
        assert torch.equal(run(model, 2.0), model(X, T, C, agd_scale=2.0))
        assert torch.equal(model(X, T, C), expected)
        set_guidance(model, None)
        with pytest.raises(ValueError, match="needs a guidance scale"):
            model(X, T, C)


def test_scales_outside_the_trained_range_warn():
    model = plain(guidance_range=(1.0, 6.0))
    run(model, 6.0)
    with pytest.warns(UserWarning, match=r"scale 8 is outside `guidance_range` \(1.0, 6.0\)"):
        run(model, torch.tensor([2.0, 8.0, 3.0]))
    with pytest.warns(UserWarning, match=r"scale 0\.5"):
        run(model, 0.5)


def test_disabled_adapters_are_the_teacher():
    net = PlainDenoiser()
    null = torch.full_like(C, 5)
    with torch.no_grad():
        expected = guided(net(X, T, null), net(X, T, C), 4.0)
        model = plain(net=net)
        with agd_guidance(model, 4.0), agd_disabled(model):
            assert torch.equal(guided(model(X, T, null), model(X, T, C), 4.0), expected)
        with model.disable_adapter():
            assert torch.equal(guided(model(X, T, null), model(X, T, C), 4.0), expected)
    assert not torch.equal(run(model, 4.0), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folded_adapter_is_a_bias(architecture):
    model = plain(architecture, condition_on=("scale",), condition_modules=None)
    expected = run(model, 4.0)
    folded = model.fold(4.0)
    assert isinstance(folded, PlainDenoiser)
    with torch.no_grad():
        torch.testing.assert_close(folded(X, T, C), expected, rtol=1e-5, atol=1e-5)
    timed = plain(architecture)
    with pytest.raises(NotImplementedError, match="condition_on"):
        timed.fold(4.0)
    assert timed.peft_config  # still there


def test_a_condition_fn_reads_calls_of_other_denoisers():
    class Renamed(PlainDenoiser):
        def forward(self, noisy, when, what):
            return super().forward(noisy, when, what)

    model = plain(net=Renamed())
    with pytest.raises(ValueError, match="no 'timestep'"):
        run(model)
    set_condition_fn(model, lambda args, kwargs: {"timestep": args[1]})
    assert torch.equal(run(model), run(plain()))
    vectors = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    model = plain(condition_modules=None, condition_sizes={"class": 7})
    set_condition_fn(model, lambda args, kwargs: {"class": vectors})
    assert not torch.equal(run(model)[0], run(model, c=C)[1])
    set_condition_fn(model, lambda args, kwargs: {"class": args[2]})
    with pytest.raises(ValueError, match="'class' must be vectors of 7 numbers"):
        run(model)
    set_condition_fn(model, lambda args, kwargs: {"class": vectors[:2]})
    with pytest.raises(ValueError, match="one row or 3"):
        run(model)


def test_config_errors_name_what_is_allowed():
    for fields, message in (
        ({"architecture": "gate"}, "'offset' or 'cross_attention'"),
        ({"condition_on": ("timestep",)}, "`condition_on` must be 'scale' and any of"),
        ({"hidden_size": 7}, "`hidden_size` must be even"),
        ({"num_heads": 3}, "divisor of `hidden_size`"),
        ({"guidance_range": (6.0, 1.0)}, "lower one first"),
        ({"condition_sizes": {"colour": 3}}, "`condition_sizes` must be a mapping"),
    ):
        with pytest.raises(ValueError, match=message):
            AgdConfig(**fields)
    for fields, message in (
        ({"condition_on": ("scale", "prompt")}, "width cannot be read off PlainDenoiser"),
        ({"condition_modules": {"class": "nothing"}}, "no such module"),
        ({"timestep_embedding": "base"}, "no timestep embedding"),
        ({"target_modules": None}, "attention blocks of PlainDenoiser are not known"),
    ):
        with pytest.raises(ValueError, match=message):
            plain(**fields)


def sites(model):
    return [name for name, module in model.named_modules() if isinstance(module, AgdLayer)]


def test_known_denoisers_are_adapted_at_all_their_sites():
    unet = get_peft_model(tiny_unet(), AgdConfig(hidden_size=8, architecture="cross_attention"))
    assert len(sites(unet)) == 6 and all(name.endswith("attn2") for name in sites(unet))
    assert unet.peft_config["default"].condition_on == ("scale", "timestep", "prompt")
    assert unet.peft_config["default"].condition_sizes == {"timestep": 32, "prompt": 12}
    dit = get_peft_model(tiny_dit(), AgdConfig(hidden_size=8))
    assert [name[-26:] for name in sites(dit)] == ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
    assert dit.peft_config["default"].condition_on == ("scale", "timestep", "class")
    sd3 = get_peft_model(tiny_sd3(), AgdConfig(hidden_size=8))
    assert len(sites(sd3)) == 2 and sd3.peft_config["default"].condition_on == ("scale", "timestep", "prompt")
    reference = REFERENCE_SITES["UNet2DConditionModel"]
    assert len(sites(get_peft_model(tiny_unet(), AgdConfig(hidden_size=8, target_modules=reference)))) == 5


def test_sizes_are_those_counted_in_the_reference():
    from diffusers import DiTTransformer2DModel, UNet2DConditionModel

    with torch.device("meta"):
        for names, millions in (((), 24.93), (("timestep",), 33.20), (("timestep", "class"), 41.46)):
            dit = DiTTransformer2DModel(out_channels=8)  # DiT-XL/2
            config = AgdConfig(condition_on=("scale", *names))
            model = get_peft_model(dit, config, autocast_adapter_dtype=False)
            assert model.get_nb_trainable_parameters()[0] / 1e6 == pytest.approx(millions, abs=0.005)
        # Stable Diffusion 2.1
        unet = UNet2DConditionModel(sample_size=96, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20])
        targets = REFERENCE_SITES["UNet2DConditionModel"]
        config = AgdConfig(architecture="cross_attention", hidden_size=320, target_modules=targets)
        model = get_peft_model(unet, config, autocast_adapter_dtype=False)
        assert len(sites(model)) == 13
        assert model.get_nb_trainable_parameters()[0] / 1e6 == pytest.approx(29.50, abs=0.005)
        model = get_peft_model(model.unload(), AgdConfig(), autocast_adapter_dtype=False)
        assert len(sites(model)) == 16
