"""The processor of `uni_moe`: prompts with placeholders, images, videos, speech and sounds become model inputs."""

import re
from typing import Any

import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ProcessorMixin

from .segments import as_list_of_videos, as_list_of_waveforms, cut, sample_frames, segment_samples


__all__ = ["UniMoeProcessor"]

# The part each modality needs.
PARTS = {
    "image": "image_processor",
    "video": "image_processor",
    "speech": "speech_feature_extractor",
    "audio": "audio_feature_extractor",
}


class _Attributes:
    """`get_attributes`: of the class all parts there may be, of a processor those it has. `ProcessorMixin` saves the
    parts it finds here, and cannot save one that is `None`."""

    names = ("tokenizer", *dict.fromkeys(PARTS.values()))

    def __get__(self, instance: Any, owner: type) -> Any:
        names = [name for name in self.names if instance is None or getattr(instance, name, None) is not None]
        return lambda: names


class UniMoeProcessor(ProcessorMixin):
    r"""Tokenizer, image processor and feature extractors in one; all but the tokenizer may be left out.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): With a token for each placeholder.
        image_processor (`BaseImageProcessor`, *optional*): Of images and of frames of videos.
        speech_feature_extractor (`WhisperFeatureExtractor`, *optional*): Of speech.
        audio_feature_extractor (`ASTFeatureExtractor`, *optional*): Of sounds.
        patch_size (`int`, defaults to 14): Of the vision encoder.
        num_image_tokens (`int`, *optional*): Tokens of one image; (size / patch_size)^2 by default.
        num_speech_tokens (`int`, defaults to 50): Tokens of each started 30 s of speech.
        num_audio_tokens (`int`, defaults to 50): Tokens of each started segment of sound, which has the length that
            `audio_feature_extractor` takes.
        num_video_frames (`int`, defaults to 8): Frames taken of a video.
        video_pool (`str`, defaults to `"mean"`): As in [`UniMoeConfig`].
        image_token, video_token, speech_token, audio_token (`str`, *optional*): Placeholders; `None` for a modality
            that is not used.
        chat_template (`str`, *optional*): Jinja template of conversations.

    Raises:
        ValueError: a placeholder that the tokenizer does not know.

    Example:

    ```python
    >>> processor = UniMoeProcessor.for_model(model.config, tokenizer, image_processor, WhisperFeatureExtractor())
    >>> inputs = processor(text="<speech>Is this the song?", speech=[waveform], return_tensors="pt")
    ```
    """

    get_attributes: Any = _Attributes()
    speech_feature_extractor: Any
    audio_feature_extractor: Any

    def __init__(
        self,
        tokenizer=None,
        image_processor=None,
        speech_feature_extractor=None,
        audio_feature_extractor=None,
        patch_size=14,
        num_image_tokens=None,
        num_speech_tokens=50,
        num_audio_tokens=50,
        num_video_frames=8,
        video_pool="mean",
        image_token="<image>",
        video_token="<video>",
        speech_token="<speech>",
        audio_token="<audio>",
        chat_template=None,
    ):
        self.patch_size = patch_size
        self.num_image_tokens = num_image_tokens
        self.num_speech_tokens = num_speech_tokens
        self.num_audio_tokens = num_audio_tokens
        self.num_video_frames = num_video_frames
        self.video_pool = video_pool
        parts = {
            "tokenizer": tokenizer,
            "image_processor": image_processor,
            "speech_feature_extractor": speech_feature_extractor,
            "audio_feature_extractor": audio_feature_extractor,
        }
        for name, part in parts.items():
            setattr(self, name, part)
        present = {name: part for name, part in parts.items() if part is not None}
        super().__init__(**present, chat_template=chat_template or getattr(tokenizer, "chat_template", None))
        tokens = {"image": image_token, "video": video_token, "speech": speech_token, "audio": audio_token}
        known = tokenizer.get_vocab() if tokenizer is not None else {}
        for modality, token in tokens.items():
            setattr(self, f"{modality}_token", token)
            used = token is not None and PARTS[modality] in present
            if used and token not in known:
                raise ValueError(
                    f"`{modality}_token` ({token!r}) is not in the tokenizer. Add it with "
                    f"`tokenizer.add_tokens([{token!r}], special_tokens=True)`, or set `{modality}_token=None`."
                )
            setattr(self, f"{modality}_token_id", known[token] if used else None)

    @classmethod
    def for_model(
        cls,
        config: Any,
        tokenizer: Any,
        image_processor: Any = None,
        speech_feature_extractor: Any = None,
        audio_feature_extractor: Any = None,
        chat_template: str | None = None,
    ) -> "UniMoeProcessor":
        """A processor whose tokens and numbers of tokens are those of a model.

        Args:
            config ([`UniMoeConfig`]): Of the model.
            tokenizer, image_processor, speech_feature_extractor, audio_feature_extractor, chat_template: As in
                [`UniMoeProcessor`].

        Returns:
            [`UniMoeProcessor`]
        """
        ids = config.token_ids
        options: dict[str, Any] = {
            f"{name}_token": tokenizer.convert_ids_to_tokens(ids[name]) if name in ids else None for name in PARTS
        }
        for name in ("image", "speech", "audio"):
            number = config.tokens_per_item(name) if config.encoder_config(name) is not None else None
            if number is not None:
                options[f"num_{name}_tokens"] = number
        if config.vision_config is not None:
            options["patch_size"] = config.vision_config.patch_size
        return cls(
            tokenizer,
            image_processor,
            speech_feature_extractor,
            audio_feature_extractor,
            num_video_frames=config.num_video_frames,
            # Queries ask all frames at once: their number does not grow with the video.
            video_pool=config.video_pool if config.connector("image")["kind"] == "mlp" else "mean",
            chat_template=chat_template,
            **options,
        )

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # A part that is not in the file was left out.
        from transformers import AutoImageProcessor

        saved, subfolder = processor_dict or {}, kwargs.pop("subfolder", "")
        where = {"subfolder": subfolder, **kwargs}
        parts = [cls._load_tokenizer_from_pretrained("tokenizer", pretrained_model_name_or_path, **where)]
        for name in cls.get_attributes()[1:]:
            fields = saved.get(name)
            if fields is None:
                parts.append(None)
            elif name == "image_processor":
                parts.append(AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, **where))
            else:
                parts.append(cls.get_possibly_dynamic_module(fields["feature_extractor_type"])(**fields))
        return parts

    @property
    def model_input_names(self) -> list[str]:
        """Names of everything this processor may return."""
        media = {"image": ["pixel_values"], "video": ["pixel_values_videos"], "speech": ["input_features"],
                 "audio": ["audio_values", "audio_mask"]}  # fmt: skip
        present = [
            name for modality in PARTS if getattr(self, PARTS[modality]) is not None for name in media[modality]
        ]
        return [*self.tokenizer.model_input_names, *present]

    def __call__(self, images=None, text=None, videos=None, audio=None, speech=None, sampling_rate=None, **kwargs):
        """Model inputs for one prompt or several.

        Args:
            images (*optional*): Images, in the order of their placeholders over all prompts.
            text (`str` or `list[str]`): Prompts with one placeholder per image, video, speech and sound.
            videos (*optional*): Videos: arrays `(frames, H, W, 3)`, or lists of frames.
            audio, speech (*optional*): Waveforms with one channel.
            sampling_rate (`int`, *optional*): Of the waveforms; checked against the feature extractors'.
            **kwargs: Of the tokenizer, such as `padding` and `return_tensors`.

        Returns:
            `BatchFeature`: The tokenizer's outputs, and `pixel_values`, `pixel_values_videos`, `input_features`,
            `audio_values` and `audio_mask` as tensors.

        Raises:
            ValueError: no text, media for which there is no part, another number of them than of placeholders, a
                wrong sampling rate, or an empty waveform.
        """
        if text is None:
            raise ValueError("`text` is missing: media are read at the placeholders of a prompt.")
        for group in ("common_kwargs", "text_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs"):
            own = kwargs.pop(group, None) or {}
            kwargs |= own if group in ("common_kwargs", "text_kwargs") else {}
        texts = [text] if isinstance(text, str) else list(text)
        media = {"image": images, "video": videos, "speech": speech, "audio": audio}
        data: dict[str, torch.Tensor] = {}
        for modality, items in media.items():
            token = getattr(self, f"{modality}_token")
            found = sum(prompt.count(token) for prompt in texts) if token is not None else 0
            lengths: list[int] = []
            if items is not None and (len(items) if hasattr(items, "__len__") else True):
                self._check_part(modality, sampling_rate)
                values, lengths = getattr(self, f"_read_{modality}")(items)
                data |= values
            if found != len(lengths):
                raise ValueError(
                    f"`text` has {found} placeholders {token!r}, but there are {len(lengths)} items of {modality}: "
                    "write one placeholder for each."
                )
            texts = _expand(texts, token, lengths)
        encoded = self.tokenizer(texts, **kwargs)
        return BatchFeature({**encoded, **data})

    def _check_part(self, modality: str, sampling_rate: int | None) -> None:
        part = getattr(self, PARTS[modality])
        if part is None or getattr(self, f"{modality}_token") is None:
            raise ValueError(
                f"There is {modality}, but this processor has no `{PARTS[modality]}` or no `{modality}_token`."
            )
        wanted = getattr(part, "sampling_rate", None)
        if None not in (sampling_rate, wanted) and sampling_rate != wanted:
            raise ValueError(f"`sampling_rate` must be {wanted}, got {sampling_rate}: resample the waveforms.")

    # Each returns model inputs, and the number of tokens of each item.
    def _read_image(self, items: Any) -> tuple[dict[str, torch.Tensor], list[int]]:
        pixels = self.image_processor(make_flat_list_of_images(items), return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels}, [self._patches(pixels)] * len(pixels)

    def _read_video(self, items: Any) -> tuple[dict[str, torch.Tensor], list[int]]:
        videos = [sample_frames(video, self.num_video_frames) for video in as_list_of_videos(items)]
        frames = [frame for video in videos for frame in video]
        pixels = self.image_processor(frames, return_tensors="pt")["pixel_values"]
        factor = self.num_video_frames if self.video_pool == "concat" else 1
        pixels = pixels.unflatten(0, (len(videos), self.num_video_frames))
        return {"pixel_values_videos": pixels}, [factor * self._patches(pixels)] * len(videos)

    def _read_speech(self, items: Any) -> tuple[dict[str, torch.Tensor], list[int]]:
        extractor = self.speech_feature_extractor
        cuts = [cut(wave, segment_samples(extractor))[0] for wave in as_list_of_waveforms(items)]
        parts = [part for segments in cuts for part in segments]
        features = extractor(parts, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_features"]
        return {"input_features": features}, [self.num_speech_tokens * len(segments) for segments in cuts]

    def _read_audio(self, items: Any) -> tuple[dict[str, torch.Tensor], list[int]]:
        extractor = self.audio_feature_extractor
        window, hop = extractor.sampling_rate // 40, extractor.sampling_rate // 100  # 25 ms and 10 ms
        cuts = [cut(wave, segment_samples(extractor), window) for wave in as_list_of_waveforms(items)]
        parts = [part for segments, _ in cuts for part in segments]
        values = extractor(parts, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        values = values[extractor.model_input_names[0]]  # (M, frames, mels)
        samples = torch.tensor([length for _, lengths in cuts for length in lengths])
        frames = 1 + (samples - window).clamp(min=0) // hop
        mask = (torch.arange(values.shape[1]) < frames[:, None]).long()
        tokens = [self.num_audio_tokens * len(segments) for segments, _ in cuts]
        return {"audio_values": values, "audio_mask": mask}, tokens

    def _patches(self, pixels: torch.Tensor) -> int:
        height, width = pixels.shape[-2:]
        return self.num_image_tokens or (height // self.patch_size) * (width // self.patch_size)


def _expand(texts: list[str], token: str | None, lengths: list[int]) -> list[str]:
    """Each placeholder as often as its item has tokens."""
    if not lengths or token is None:
        return texts
    counts = iter(lengths)
    return [re.sub(re.escape(token), lambda found: found.group() * next(counts), text) for text in texts]
