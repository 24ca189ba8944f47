"""A model folder from the Hub's cache or the Hub, giving up within seconds where there is no network."""

from pathlib import Path

from huggingface_hub import HfApi, is_offline_mode, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import httpx

from .folder import first_line


__all__ = ["HubUnreachable", "fetch_from_hub"]

FILES = ["*.json", "*.jinja", "*.txt", "*.model"]


class HubUnreachable(ValueError):
    """The Hub does not answer and its cache does not hold the model."""


def fetch_from_hub(repo_id: str, *, timeout: float = 5.0) -> Path:
    """Download a model's configuration, tokenizer and weights, or find them in the Hub's cache.

    Args:
        repo_id (`str`): A model on the Hub, `"owner/name"`.
        timeout (`float`, defaults to 5.0): Seconds the Hub has to answer the first question.

    Returns:
        `Path`: The snapshot folder in the Hub's cache.

    Raises:
        HubUnreachable: If the Hub does not answer and the cache does not hold the model (a `ValueError`).
        ValueError: If the Hub has no such model, or does not give it to this user.

    Example:
        ```python
        >>> fetch_from_hub("HuggingFaceTB/SmolLM2-135M-Instruct")
        ```
    """
    try:
        # One question without retries decides: `snapshot_download` alone may retry for minutes.
        files = [item.rfilename for item in HfApi().model_info(repo_id, timeout=timeout).siblings or []]
        weights = "*.safetensors" if any(name.endswith(".safetensors") for name in files) else "*.bin"
        return Path(snapshot_download(repo_id, allow_patterns=[*FILES, weights], ignore_patterns=["*/*"]))
    except HFValidationError as error:
        raise ValueError(f"`{repo_id}` is neither a folder nor a valid Hub id. Give one of the two.") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"The Hub has no public model `{repo_id}`. Check the name, or log in with `hf auth login`."
        ) from error
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code < 500:
            raise ValueError(f"The Hub does not give `{repo_id}`: {first_line(error)}.") from error
        return cached_snapshot(repo_id, error)
    except (OSError, httpx.HTTPError, OfflineModeIsEnabled) as error:
        return cached_snapshot(repo_id, error)


def cached_snapshot(repo_id: str, reason: Exception) -> Path:
    """The last complete snapshot in the Hub's cache."""
    try:
        folder = Path(snapshot_download(repo_id, local_files_only=True))
    except OSError as error:
        folder, reason.__context__ = None, error
    if folder is None or not (folder / "config.json").is_file() or not has_weights(folder):
        why = "offline mode is on (`HF_HUB_OFFLINE`)" if is_offline_mode() else first_line(reason)
        raise HubUnreachable(
            f"The Hub cannot be reached ({why}) and its cache does not hold `{repo_id}`. "
            "Connect to a network, or give a local folder."
        ) from reason
    return folder


def has_weights(folder: Path) -> bool:
    """Whether a download got as far as the weights; shards are checked on loading."""
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
