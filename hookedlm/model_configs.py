"""What is known of pretrained models by name: their configs, weights and checkpoints.

There is no list of supported models. A name is a short one of `hookedlm.aliases`, any name on the
Hugging Face hub, a checkpoint folder, or "demo".
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig

from hookedlm.aliases import ALIASES, official_name
from hookedlm.checkpoints import checkpoint_fields
from hookedlm.classic_files import find_classic
from hookedlm.config import HookedTransformerConfig
from hookedlm.convert.outline import outline_fields
from hookedlm.errors import LoadError
from hookedlm.loading import resolve, shortened
from hookedlm.model import HookedTransformer
from hookedlm.reach import where_found

OFFICIAL_MODEL_NAMES: list[str] = list(dict.fromkeys(ALIASES.values()))
"""Where on the hub the models with short names are. Others load as well."""

MODEL_ALIASES: dict[str, list[str]] = {
    name: [alias for alias, target in ALIASES.items() if target == name]
    for name in OFFICIAL_MODEL_NAMES
}
"""Hub name -> its short names."""

DEFAULT_MODEL_ALIASES: list[str] = [aliases[0] for aliases in MODEL_ALIASES.values()]
"""One short name for each model that has any."""


def make_model_alias_map() -> dict[str, str]:
    """Short name -> name on the hub, in a dictionary of the caller's own."""
    return dict(ALIASES)


def get_official_model_name(model_name: str) -> str:
    """Where a name leads on the hub. Nothing is looked up: whether there is such a model shows when
    it is loaded."""
    return official_name(model_name)


# Configs ------------------------------------------------------------------------------------------


def get_pretrained_model_config(
    model_name: str,
    hf_cfg: Any = None,
    checkpoint_index: int | None = None,
    checkpoint_value: int | None = None,
    fold_ln: bool = False,
    device: str | torch.device | None = None,
    n_devices: int = 1,
    default_prepend_bos: bool | None = None,
    dtype: torch.dtype = torch.float32,
    first_n_layers: int | None = None,
    n_ctx: int | None = None,
    **kwargs: Any,
) -> HookedTransformerConfig:
    """The config that the model would have, without loading its weights.

    ``hf_cfg``: a transformers config or its dictionary, instead of the one that the name leads to.
    ``fold_ln``: as after folding. Other keywords go to transformers' ``AutoConfig``. What only
    running can tell, that a part must stay as Hugging Face wrote it, is not known here.

    Raises LoadError where no config is found, ConversionError where it describes no language model
    that can be read.
    """
    if hf_cfg is None:
        kwargs = where_found(kwargs)
    classic = None if hf_cfg is not None else find_classic(*resolve(model_name), kwargs)
    if classic is not None:
        known = classic.fields()
        if first_n_layers is not None:
            known["n_layers"] = first_n_layers
    else:
        config = _hf_config(model_name, hf_cfg, kwargs)
        if first_n_layers is not None:
            config = shortened(config, first_n_layers)
        known = outline_fields(config, model_name.rstrip("/").split("/")[-1])
        known["tokenizer_name"] = resolve(model_name)[0]
    known |= {"dtype": dtype, "device": None if device is None else str(device)}
    known["n_devices"] = n_devices
    kind = known["normalization_type"]
    if fold_ln and kind in ("LN", "RMS"):
        known["normalization_type"] = f"{kind}Pre"
    if default_prepend_bos is not None:
        known["default_prepend_bos"] = default_prepend_bos
    if n_ctx is not None:
        known["n_ctx"] = n_ctx
    if checkpoint_index is not None or checkpoint_value is not None:
        known |= checkpoint_fields(model_name, checkpoint_index, checkpoint_value)
    return HookedTransformerConfig(**known)


def _hf_config(model_name: str, hf_cfg: Any, kwargs: dict[str, Any]) -> Any:
    if isinstance(hf_cfg, Mapping):
        if "model_type" not in hf_cfg:
            raise LoadError("hf_cfg has no 'model_type', which says what kind of config it is")
        return AutoConfig.for_model(**hf_cfg)
    if hf_cfg is not None:
        return copy.deepcopy(hf_cfg)
    path, local = resolve(model_name)
    try:
        return AutoConfig.from_pretrained(
            path, **kwargs | {"local_files_only": True} if local else kwargs
        )
    except (OSError, ValueError, KeyError) as error:
        why = " ".join(str(error).split())
        raise LoadError(f"can't read a config for {model_name!r}: {why}") from error


def convert_hf_model_config(model_name: str, **kwargs: Any) -> dict[str, Any]:
    """`get_pretrained_model_config` as a dictionary of fields."""
    return get_pretrained_model_config(model_name, **kwargs).to_dict()


def convert_neel_model_config(official_model_name: str, **kwargs: Any) -> dict[str, Any]:
    """The fields of a config in TransformerLens' own format. Raises LoadError if there is none."""
    classic = find_classic(*resolve(official_model_name), kwargs)
    if classic is None:
        raise LoadError(f"{official_model_name!r} has no config in TransformerLens' format")
    return classic.fields()


def get_num_params_of_pretrained(model_name: str) -> int:
    """Attention and MLP weights of a model; embeddings, biases and norms are not counted."""
    n_params = get_pretrained_model_config(model_name).n_params
    assert n_params is not None, "every config counts them"
    return n_params


@dataclass(frozen=True)
class BasicConfig:
    """The sizes of a model."""

    d_model: int
    n_layers: int
    n_heads: int
    d_head: int
    d_mlp: int | None
    n_ctx: int
    d_vocab: int
    eps: float


def get_basic_config(model_name: str, **kwargs: Any) -> BasicConfig:
    """Only the sizes of `get_pretrained_model_config`, which says what it raises."""
    known = get_pretrained_model_config(model_name, **kwargs).to_dict()
    return BasicConfig(**{field.name: known[field.name] for field in fields(BasicConfig)})


# Weights ------------------------------------------------------------------------------------------


def get_pretrained_state_dict(
    official_model_name: str,
    cfg: HookedTransformerConfig | None = None,
    hf_model: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> dict[str, Float[Tensor, "..."]]:
    """The unprocessed weights by their names here, copies of the caller's own.

    ``cfg`` need not be given: sizes come from the weights. Raises as `hookedlm.load`.
    """
    model = HookedTransformer.load(official_model_name, hf_model=hf_model, dtype=dtype, **kwargs)
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def convert_weights(
    hf_model: nn.Module, cfg: HookedTransformerConfig | None = None
) -> dict[str, Float[Tensor, "..."]]:
    """The unprocessed weights of a Hugging Face model by their names here, copies, in its dtype.

    ``cfg`` need not be given. Raises ConversionError as `hookedlm.load`.
    """
    return {
        k: weight.clone() for k, weight in HookedTransformer.load(hf_model).state_dict().items()
    }


def fill_missing_keys(
    model: HookedTransformer, state_dict: Mapping[str, Tensor]
) -> dict[str, Float[Tensor, "..."]]:
    """``model.fill_missing_keys(state_dict)``."""
    return model.fill_missing_keys(state_dict)
