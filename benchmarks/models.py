"""The models that are measured: shapes of known models, with random weights.

    python benchmarks/models.py NAME FOLDER      # writes a checkpoint, from seed 0

Every library loads the same folder. With it goes a tokenizer whose only job is to exist: some
libraries load none without.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Model:
    """A configuration of a Hugging Face class; what differs from that class' defaults."""

    title: str
    class_name: str
    n_layers: int
    n_heads: int
    d_vocab: int
    fields: dict[str, Any]


# TransformerLens 2 looks for n_ctx, and takes every folder with "llama" in its path for one that it
# knows by name: hence "grouped".
MODELS = {
    "small": Model(
        "small (4 layers, d_model 128)",
        "GPT2LMHeadModel",
        n_layers=4,
        n_heads=4,
        d_vocab=5000,
        fields=dict(n_layer=4, n_embd=128, n_head=4, vocab_size=5000, n_ctx=1024),
    ),
    "gpt2-small": Model(
        "GPT-2 small's shape",
        "GPT2LMHeadModel",
        n_layers=12,
        n_heads=12,
        d_vocab=50257,
        fields=dict(n_ctx=1024),
    ),
    "grouped-small": Model(
        "a small Llama (4 layers, d_model 128), grouped queries",
        "LlamaForCausalLM",
        n_layers=4,
        n_heads=4,
        d_vocab=5000,
        fields=dict(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=5000,
            max_position_embeddings=2048,
        ),
    ),
    "grouped-0.5b": Model(
        "a Llama of 0.5B, grouped queries",
        "LlamaForCausalLM",
        n_layers=24,
        n_heads=14,
        d_vocab=32000,
        fields=dict(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=32000,
            max_position_embeddings=4096,
        ),
    ),
}


def write(name: str, folder: Path) -> None:
    """Write a model's checkpoint and tokenizer."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    model = MODELS[name]
    torch.manual_seed(0)
    cls = getattr(transformers, model.class_name)
    # Nothing in random weights ends a text; a token id beyond the vocabulary would be refused.
    last = model.d_vocab - 1
    config = cls.config_class(**model.fields, bos_token_id=last, eos_token_id=last)
    cls(config).eval().save_pretrained(folder)
    words = {f"w{i}": i for i in range(model.d_vocab)}
    end = f"w{last}"
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token=end)),
        bos_token=end,
        eos_token=end,
        unk_token=end,
    )
    tokenizer.save_pretrained(folder)
    # transformers 5 writes a class that transformers 4 does not know.
    told = folder / "tokenizer_config.json"
    fields = json.loads(told.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    told.write_text(json.dumps(fields))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write(arguments.name, arguments.folder)
