"""TransformerLens 4: a bridge around Hugging Face's model."""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from libraries.lens import PACKAGE, TASKS

__all__ = ["PACKAGE", "TASKS", "convert", "load"]


def load(folder: str, device: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return convert(model.to(device), folder)


def convert(model: Any, folder: str) -> Any:
    device = next(model.parameters()).device
    return TransformerBridge.boot_transformers(folder, hf_model=model, device=str(device))
