"""Mixture-of-Experts methods behind the extension points of transformers, PEFT and TRL."""

__version__ = "0.1.0"
