"""Model types. Importing this package registers every config; model classes follow when they are first needed."""

from . import gpt2, llama, moe_plus_plus, qwen2, qwen3


__all__ = ["gpt2", "llama", "moe_plus_plus", "qwen2", "qwen3"]
