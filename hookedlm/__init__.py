"""Hugging Face causal language models as one uniform transformer with a hook point everywhere."""

__version__ = "0.1.0"
