"""Training scripts: `python -m hf_moe.trainers.scripts.<name>`, also as `hf-moe train <name>`."""

__all__ = []
