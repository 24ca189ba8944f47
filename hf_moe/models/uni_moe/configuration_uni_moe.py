"""Configuration of `uni_moe`: a MoE language model, and an encoder and a connector for each modality it has."""

from dataclasses import field
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig

from hf_moe.models.moe_llava.configuration_moe_llava import (
    BACKBONES,
    IMAGE_VOCABULARY,
    TEXT_FIELDS,
    TextFieldsMixin,
    is_moe_decoder,
    moe_text_config,
    paper_fields,
)
from hf_moe.registration import load_modeling


__all__ = ["CONNECTORS", "ENCODERS", "MODALITIES", "UniMoeConfig"]

#: What a prompt may hold, in the order in which it is encoded, and the encoder of each: a field `<encoder>_config`.
ENCODERS = {"image": "vision", "video": "vision", "speech": "speech", "audio": "audio"}
MODALITIES = tuple(ENCODERS)
#: Kinds of connectors. "mlp" gives as many rows as the encoder, the others `num_query_tokens` each.
CONNECTORS = ("mlp", "decoder_query", "qformer")
# The reference's language model: no capacity, and no balance loss with four experts.
UNI_MOE = {"expert_capacity_factor": None, "router_aux_loss_coef": 0.0}


def _connector(kind: str) -> Any:
    return field(default_factory=lambda: {"kind": kind})


@strict
class UniMoeConfig(TextFieldsMixin, PreTrainedConfig):
    r"""Configuration of [`UniMoeModel`]. Fields of [`~hf_moe.models.configuration.MoeConfigMixin`] are handed on to
    `text_config` and can be read and set here.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*): Of a MoE decoder, or of the dense one, which becomes it
            with the paper's settings: 4 experts, 2 per token, every second layer, no capacity, no balance loss; see
            [`MoeLlavaConfig`].
        vision_config (`PreTrainedConfig` or `dict`, *optional*): Encoder of images and videos (CLIP); `None`: neither.
        speech_config (`PreTrainedConfig` or `dict`, *optional*): Encoder of speech (Whisper); `None`: no speech.
        audio_config (`PreTrainedConfig` or `dict`, *optional*): Encoder of sounds, such as the audio spectrogram
            transformer; `None`: no sounds. Note: The paper's BEATs is not in transformers.
        image_connector, speech_connector, audio_connector (`dict`): `{"kind": ...}`: `"mlp"` (the default for images),
            `"decoder_query"` (a Whisper decoder, the default for speech) or `"qformer"` (the default for sounds);
            optionally `"num_query_tokens"`, and `"config"`, fields of `Blip2QFormerConfig` or `WhisperConfig`.
        num_query_tokens (`int`, defaults to 50): Query vectors of a connector that does not say its own number.
        image_token_id, video_token_id, speech_token_id, audio_token_id (`int`, *optional*): Placeholders in the
            prompt; needed for what shall be read.
        video_pool (`str`, defaults to `"mean"`): `"mean"` averages the features of a video's frames, as in the paper;
            `"concat"` keeps the frames one after the other.
        num_video_frames (`int`, defaults to 8): Frames taken of a video.
        vision_feature_layer (`int`, defaults to -2): Hidden states of the vision encoder that are projected.
        freeze_encoders (`bool`, defaults to `True`): Encoders run without gradients, as in every phase of the paper.
        lm_head_bias (`bool`, defaults to `False`): Whether the language-model head has a bias.
        tie_word_embeddings (`bool`, defaults to `False`): Whether head and embedding share their weight.

    Raises:
        ValueError: a text type without a MoE backbone; an encoder without a token, or the other way round; tokens that
            are outside the vocabulary or used twice; an unknown kind of connector, or one that does not fit.

    Example:

    ```python
    >>> from transformers import LlamaConfig, WhisperConfig
    >>> from hf_moe import UniMoeConfig, UniMoeForConditionalGeneration
    >>> text = LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...                    num_attention_heads=4)
    >>> speech = WhisperConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    ...                        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32)
    >>> config = UniMoeConfig(text_config=text, speech_config=speech, speech_token_id=99)
    >>> model = UniMoeForConditionalGeneration(config)
    ```
    """

    model_type = "uni_moe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "aux_loss",
        "router_logits",
        "router_indices",
    ]
    sub_configs_defaults = {
        "text_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="moe_llama",
            init_kwargs={"vocab_size": IMAGE_VOCABULARY, **paper_fields(32, **UNI_MOE)},
        ),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model", optional=True),
        "speech_config": SubConfigSpec(config_class=AutoConfig, model_type="whisper", optional=True),
        "audio_config": SubConfigSpec(
            config_class=AutoConfig, model_type="audio-spectrogram-transformer", optional=True
        ),
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    speech_config: dict | PreTrainedConfig | None = None
    audio_config: dict | PreTrainedConfig | None = None
    image_connector: dict[str, Any] = _connector("mlp")
    speech_connector: dict[str, Any] = _connector("decoder_query")
    audio_connector: dict[str, Any] = _connector("qformer")
    num_query_tokens: int = 50
    image_token_id: int | None = None
    video_token_id: int | None = None
    speech_token_id: int | None = None
    audio_token_id: int | None = None
    video_pool: str = "mean"
    num_video_frames: int = 8
    vision_feature_layer: int = -2
    freeze_encoders: bool = True
    lm_head_bias: bool = False
    tie_word_embeddings: bool = False
    # TRL reads `config.auto_map` of every model it loads by path; the Hub shim fills it.
    auto_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self, **kwargs):
        load_modeling(type(self))
        moe_fields = {name: kwargs.pop(name) for name in TEXT_FIELDS & kwargs.keys()}
        text = self.text_config
        if text is not None or moe_fields:
            text = {"model_type": "llama", "vocab_size": IMAGE_VOCABULARY} if text is None else text
            model_type = text.get("model_type") if isinstance(text, dict) else text.model_type
            if model_type in BACKBONES:
                moe_fields = {**UNI_MOE, **moe_fields}
            self.text_config = moe_text_config(text, **moe_fields)
        super().__post_init__(**kwargs)
        # `@strict` checks again, but wraps what it catches in an error that is no ValueError.
        self.validate_architecture()

    # -- derived -------------------------------------------------------------------------------------------------
    @property
    def token_ids(self) -> dict[str, int]:
        """Placeholder ids by modality, of those that have one."""
        ids = {modality: getattr(self, f"{modality}_token_id") for modality in MODALITIES}
        return {modality: token_id for modality, token_id in ids.items() if token_id is not None}

    def encoder_config(self, modality: str) -> Any:
        """The config of a modality's encoder, `None` without one."""
        return getattr(self, f"{ENCODERS[modality]}_config")

    def connector(self, modality: str) -> dict[str, Any]:
        """The connector's settings, `num_query_tokens` among them; a video has that of images."""
        settings = getattr(self, f"{'image' if modality == 'video' else modality}_connector")
        return {"num_query_tokens": self.num_query_tokens, **settings}

    def tokens_per_item(self, modality: str) -> int | None:
        """Placeholders of one image, video or segment of sound; `None` where only the encoder knows."""
        settings, encoder = self.connector(modality), self.encoder_config(modality)
        frames = self.num_video_frames if modality == "video" and self.video_pool == "concat" else 1
        if settings["kind"] != "mlp":
            return settings["num_query_tokens"]
        if modality == "speech":
            return encoder.max_source_positions
        if modality == "audio":
            return None
        return frames * (encoder.image_size // encoder.patch_size) ** 2

    def validate_architecture(self):
        """Checked when the config is constructed and saved.

        Raises:
            ValueError: see [`UniMoeConfig`].
        """
        text: Any = self.text_config
        if not is_moe_decoder(text):
            raise ValueError(
                f"`text_config` is of type {text.model_type!r}, which is no MoE decoder of hf_moe. Use one of "
                f"{sorted(set(BACKBONES.values()))}, or a dense type that becomes one: {sorted(BACKBONES)}."
            )
        text.validate_architecture()
        self._validate_tokens(text.vocab_size)
        if self.video_pool not in ("mean", "concat"):
            raise ValueError(f"`video_pool` must be 'mean' or 'concat', got {self.video_pool!r}.")
        for name in ("num_query_tokens", "num_video_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for modality in ("image", "speech", "audio"):
            self._validate_connector(modality)

    def _validate_tokens(self, vocab_size: int) -> None:
        tokens = self.token_ids
        for modality, token_id in tokens.items():
            if not 0 <= token_id < vocab_size:
                raise ValueError(
                    f"`{modality}_token_id` ({token_id}) is not in the vocabulary of the language model "
                    f"(`text_config.vocab_size` = {vocab_size}). Add the token to the tokenizer, resize the "
                    "embeddings, and give its id."
                )
            if self.encoder_config(modality) is None:
                raise ValueError(
                    f"`{modality}_token_id` is {token_id}, but there is no encoder for {modality}: give "
                    f"`{ENCODERS[modality]}_config`, or leave the token out."
                )
        if len(set(tokens.values())) < len(tokens):
            raise ValueError(f"Every modality needs a placeholder of its own, got {tokens}.")
        for encoder in dict.fromkeys(ENCODERS.values()):
            names = [modality for modality in MODALITIES if ENCODERS[modality] == encoder]
            if getattr(self, f"{encoder}_config") is not None and not tokens.keys() & set(names):
                wanted = " or ".join(f"`{name}_token_id`" for name in names)
                raise ValueError(f"`{encoder}_config` is given without a placeholder: set {wanted}.")

    def _validate_connector(self, modality: str) -> None:
        name, settings, encoder = f"{modality}_connector", self.connector(modality), self.encoder_config(modality)
        if settings.get("kind") not in CONNECTORS:
            raise ValueError(f"`{name}['kind']` must be one of {list(CONNECTORS)}, got {settings.get('kind')!r}.")
        unknown = settings.keys() - {"kind", "num_query_tokens", "config"}
        if unknown:
            raise ValueError(f"`{name}` may have 'kind', 'num_query_tokens' and 'config', got {sorted(unknown)} too.")
        if settings["num_query_tokens"] < 1:
            raise ValueError(f"`{name}['num_query_tokens']` must be at least 1, got {settings['num_query_tokens']}.")
        if encoder is None or settings["kind"] != "decoder_query":
            return
        if encoder.model_type != "whisper":
            raise ValueError(
                f"`{name}['kind']` is 'decoder_query', whose decoder is Whisper's, but the encoder is of type "
                f"{encoder.model_type!r}. Use 'qformer' or 'mlp'."
            )
        places = settings.get("config", {}).get("max_target_positions", encoder.max_target_positions)
        if settings["num_query_tokens"] > places:
            raise ValueError(
                f"`{name}['num_query_tokens']` ({settings['num_query_tokens']}) exceeds the positions of its decoder "
                f"(`max_target_positions` = {places})."
            )
