"""TransformerLens 2, without the processing that changes the weights."""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens import HookedTransformer
from transformer_lens import loading_from_pretrained as loading
from transformer_lens.pretrained import weight_conversions
from transformers import AutoModelForCausalLM

from libraries.lens import PACKAGE, TASKS

__all__ = ["PACKAGE", "TASKS", "convert", "load"]


def load(folder: str, device: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return convert(model, folder, device)


def convert(model: Any, folder: str, device: str = "cpu") -> Any:
    """What ``from_pretrained_no_processing`` does, which takes known names only."""
    cfg = loading.get_pretrained_model_config(
        folder, hf_cfg=model.config.to_dict(), device=device, dtype=torch.float32
    )
    state_dict = WEIGHTS[model.config.model_type](model, cfg)
    made = HookedTransformer(cfg, move_to_device=False)
    made.load_and_process_state_dict(
        state_dict,
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    made.move_model_modules_to_device()
    return made.eval()


WEIGHTS = {
    "gpt2": weight_conversions.convert_gpt2_weights,
    "llama": weight_conversions.convert_llama_weights,
}
