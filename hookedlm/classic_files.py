"""Checkpoints in TransformerLens' own format: gelu-2l, attn-only-2l, solu-1l, othello-gpt, ...

Such a folder, or repository of the hub, has a config.json with fields of `HookedTransformerConfig`
and no ``model_type``, and weights by TransformerLens' names in .pth files: those at the end of
training in ``*final.pth``, those of a step in ``*_<step>.pth``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import huggingface_hub
import torch
from einops import rearrange
from huggingface_hub.errors import LocalEntryNotFoundError
from jaxtyping import Float
from torch import Tensor
from transformers import PretrainedConfig

from hookedlm.errors import LoadError

StateDict = dict[str, Float[Tensor, "..."]]

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")

REQUIRED = ("d_model", "n_layers", "n_heads", "d_head", "n_ctx", "d_vocab", "act_fn", "attn_only")
"""Fields that every config of the format has."""

STEP_FILE = re.compile(r".*_(\d+)\.pth")


@dataclass(frozen=True)
class ClassicCheckpoint:
    """A config of the format, and where it was found: a folder, or a name on the hub."""

    raw: Mapping[str, Any]
    place: str
    local: bool
    options: Mapping[str, Any]

    def fields(self) -> dict[str, Any]:
        """The fields of a `HookedTransformerConfig`."""
        raw = self.raw
        known = {name: raw[name] for name in REQUIRED}
        if raw.get("d_mlp") is not None:
            known["d_mlp"] = raw["d_mlp"]
        old = "neel-solu-old" if "_old" in self.place else "neel"
        return known | {
            "tokenizer_name": raw.get("tokenizer_name"),
            "final_rms": raw.get("final_rms", False),
            "original_architecture": raw.get("architecture", old),
            "normalization_type": raw.get("normalization", raw.get("normalization_type")),
            "positional_embedding_type": "shortformer"
            if raw.get("shortformer_pos")
            else "standard",
            "model_name": self.place.rstrip("/").split("/")[-1],
        }

    def steps(self) -> list[int]:
        """The training steps, or tokens seen, whose weights are kept beside the final ones."""
        if self.local:
            names = [path.name for path in Path(self.place).rglob("*.pth")]
        else:
            names = huggingface_hub.list_repo_files(self.place, **self.options)
        found = [STEP_FILE.fullmatch(name) for name in names]
        return sorted(int(match[1]) for match in found if match is not None)

    def weights(self, step: int | None = None) -> StateDict:
        """The weights by TransformerLens' names, at the end of training or at a step of it.

        Raises LoadError when there are none, or when the file holds more than tensors.
        """
        pattern = "*final.pth" if step is None else f"*_{step}.pth"
        folder = Path(self.place if self.local else self._fetched(pattern))
        files = sorted(folder.rglob(pattern))
        if not files:
            raise LoadError(f"{self.place!r} has no weights {pattern}")
        try:
            weights = torch.load(files[0], map_location="cpu", weights_only=True)
        except (UnpicklingError, RuntimeError, EOFError) as error:
            raise LoadError(f"{files[0]} is no file of tensors: {error}") from error
        fields = self.fields()
        layout = LAYOUTS.get(fields["original_architecture"])
        return weights if layout is None else layout(weights, fields)

    def _fetched(self, pattern: str) -> str:
        try:
            return huggingface_hub.snapshot_download(
                self.place, allow_patterns=[pattern], **self.options
            )
        except (OSError, LocalEntryNotFoundError) as error:
            raise LoadError(f"{pattern} of {self.place!r} can't be had: {error}") from error


def find_classic(place: str, local: bool, options: Mapping[str, Any]) -> ClassicCheckpoint | None:
    """The checkpoint in TransformerLens' format that a folder or hub name holds; None if none.

    Of ``options``, `HUB_OPTIONS` go to the hub.
    """
    kept = {name: options[name] for name in HUB_OPTIONS if name in options}
    try:
        if local:
            raw = json.loads((Path(place) / "config.json").read_text("utf-8"))
        else:
            raw, _ = PretrainedConfig.get_config_dict(place, **kept)
    except (OSError, ValueError):
        return None  # whoever reads it as Hugging Face's says what is wrong
    if "model_type" in raw or not all(name in raw for name in REQUIRED):
        return None
    return ClassicCheckpoint(raw, place, local, kept)


# Older layouts ------------------------------------------------------------------------------------


def _solu_old(weights: StateDict, fields: Mapping[str, Any]) -> StateDict:
    """The first SoLU models: other names of norms; up to 6 layers matrices are [out, in], and up to
    8 layers so are positions."""
    renamed = {}
    for name, x in weights.items():
        own = name.replace("norm", "ln")
        own = f"ln_final.{own.removeprefix('ln.')}" if own.startswith("ln.") else own
        turned = fields["n_layers"] <= (8 if own == "pos_embed.W_pos" else 6)
        renamed[own] = x.transpose(-2, -1) if turned and "W_" in own else x
    return renamed


def _mingpt(weights: StateDict, fields: Mapping[str, Any]) -> StateDict:
    """minGPT (github.com/karpathy/minGPT): torch's linear layers, a matrix each for q, k and v."""
    heads = {"h": fields["n_heads"]}
    result = {
        "embed.W_E": weights["tok_emb.weight"],
        "pos_embed.W_pos": weights["pos_emb"].squeeze(0),
        "ln_final.w": weights["ln_f.weight"],
        "ln_final.b": weights["ln_f.bias"],
        "unembed.W_U": weights["head.weight"].T,
    }
    for layer in range(fields["n_layers"]):
        block = f"blocks.{layer}"
        for ln in ("ln1", "ln2"):
            result[f"{block}.{ln}.w"] = weights[f"{block}.{ln}.weight"]
            result[f"{block}.{ln}.b"] = weights[f"{block}.{ln}.bias"]
        for letter, place in (("Q", "query"), ("K", "key"), ("V", "value")):
            W, b = (weights[f"{block}.attn.{place}.{leaf}"] for leaf in ("weight", "bias"))
            result[f"{block}.attn.W_{letter}"] = rearrange(W, "(h e) d -> h d e", **heads)
            result[f"{block}.attn.b_{letter}"] = rearrange(b, "(h e) -> h e", **heads)
        W_O = weights[f"{block}.attn.proj.weight"]
        result[f"{block}.attn.W_O"] = rearrange(W_O, "d (h e) -> h e d", **heads)
        result[f"{block}.attn.b_O"] = weights[f"{block}.attn.proj.bias"]
        for index, which in ((0, "in"), (2, "out")):
            result[f"{block}.mlp.W_{which}"] = weights[f"{block}.mlp.{index}.weight"].T
            result[f"{block}.mlp.b_{which}"] = weights[f"{block}.mlp.{index}.bias"]
    if "head.bias" in weights:
        result["unembed.b_U"] = weights["head.bias"]
    else:
        result["unembed.b_U"] = torch.zeros_like(weights["head.weight"][:, 0])
    return result


LAYOUTS: dict[str, Callable[[StateDict, Mapping[str, Any]], StateDict]] = {
    "neel-solu-old": _solu_old,
    "mingpt": _mingpt,
}
"""How older training code named and laid out its weights, by ``original_architecture``."""


def first_layers(weights: StateDict, n: int) -> StateDict:
    """The weights without those of blocks from ``n`` on."""
    numbered = re.compile(r"blocks\.(\d+)\.")
    layer = {name: numbered.match(name) for name in weights}
    return {name: x for name, x in weights.items() if not (m := layer[name]) or int(m[1]) < n}
