"""Loading: a name, a folder or a module becomes a config, layers and a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hookedlm.aliases import ALIASES, official_name
from hookedlm.classic_files import ClassicCheckpoint, StateDict, find_classic, first_layers
from hookedlm.config import HookedTransformerConfig
from hookedlm.convert import hf
from hookedlm.convert.conversion import Conversion
from hookedlm.convert.convert import convert
from hookedlm.convert.describe import config_fields, dtype_of
from hookedlm.convert.placed import device_of, is_placed
from hookedlm.convert.text_model import auto_class
from hookedlm.errors import LoadError
from hookedlm.families import Row
from hookedlm.names import nearest
from hookedlm.reach import where_found

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
"""A folder with none of these holds no tokenizer."""

DEMO = Path(__file__).parent / "demo"
"""The project's own trained model, an ordinary Hugging Face checkpoint folder."""


@dataclass
class Loaded:
    """Everything a `HookedTransformer` is made from."""

    cfg: HookedTransformerConfig
    layers: Conversion | None
    """On Hugging Face's tensors; None for a checkpoint in TransformerLens' format."""
    tokenizer: Any
    device: str | torch.device | None
    """Where it should go."""
    dtype: torch.dtype | None
    """What it should be cast to."""
    weights: StateDict | None = None
    """Of a checkpoint in TransformerLens' format, for a model built from ``cfg``."""


def resolve(name: str) -> tuple[str, bool]:
    """(hub name or folder, whether it is local): aliases looked up, "demo" the shipped model."""
    if name == "demo":
        return str(DEMO), True
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser()), True
    if name.startswith((".", "/", "~")):
        raise LoadError(f"no folder {name!r}: expected one with a config.json and weights")
    return official_name(name), False


def default_device() -> torch.device:
    """CUDA if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def to_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A torch dtype from its name; None stays None. Raises LoadError on unknown names."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = vars(torch).get(dtype.removeprefix("torch."))
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise LoadError(f"dtype={dtype!r}: expected e.g. 'float32', 'bfloat16', 'float16'")
    return found


def load_layers(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    strict: bool = False,
    hf_model: nn.Module | None = None,
    n_ctx: int | None = None,
    first_n_layers: int | None = None,
    checkpoint: int | None = None,
    row: Row | None = None,
    **kwargs: Any,
) -> Loaded:
    """Find, read and convert. ``dtype=None`` keeps what the checkpoint or module has.

    A module is neither moved nor changed unless ``device`` or ``dtype`` ask for it, and then a copy
    is. ``checkpoint`` is a training step, for checkpoints that keep them in files. Raises LoadError
    when a name leads nowhere, ConversionError when ``strict`` finds an opaque part. ``row`` says
    where the parts of a model are, in place of its type's own.
    """
    if isinstance(model, nn.Module):
        hf_model, name = model, _name_of(model)
    else:
        name = str(model)
    path = None
    if hf_model is None:
        path, local = resolve(name)
        kwargs = kwargs if local else where_found(kwargs)
        where = kwargs if revision is None else {**kwargs, "revision": revision}
        classic = find_classic(path, local, where)
        if classic is not None:
            sizes = (n_ctx, first_n_layers)
            return _from_classic(classic, tokenizer, to_dtype(dtype), device, *sizes, checkpoint)
        hf_model = _from_files(path, local, name, to_dtype(dtype), revision, first_n_layers, kwargs)
        if device is None and not is_placed(hf_model):
            device = default_device()
    elif first_n_layers is not None or kwargs:
        extra = ", ".join(["first_n_layers"] * (first_n_layers is not None) + list(kwargs))
        raise LoadError(f"{extra}: only used when a checkpoint is read, not with a module")
    conversion = convert(hf_model, strict=strict, row=row)
    if tokenizer is None:
        if path is None:  # a module, which may have been given a name beside it
            path, local = (_name_of(hf_model), True) if model is hf_model else resolve(name)
        tokenizer = load_tokenizer(path, local, revision)
    fields = config_fields(conversion, name.rstrip("/").split("/")[-1])
    fields |= {"dtype": dtype_of(hf_model), "device": str(device_of(hf_model))}
    if n_ctx is not None:
        fields["n_ctx"] = n_ctx
        _shorten_positions(conversion, n_ctx)
    if tokenizer is not None:
        fields["tokenizer_name"] = tokenizer.name_or_path or None
    return Loaded(HookedTransformerConfig(**fields), conversion, tokenizer, device, to_dtype(dtype))


def _from_classic(
    found: ClassicCheckpoint,
    tokenizer: Any,
    dtype: torch.dtype | None,
    device: str | torch.device | None,
    n_ctx: int | None,
    first_n_layers: int | None,
    checkpoint: int | None,
) -> Loaded:
    fields = found.fields()
    weights = found.weights(checkpoint)
    if first_n_layers is not None:
        if not 0 < first_n_layers <= fields["n_layers"]:
            raise LoadError(
                f"first_n_layers={first_n_layers}: this model has {fields['n_layers']} layers"
            )
        fields["n_layers"] = first_n_layers
        weights = first_layers(weights, first_n_layers)
    if n_ctx is not None:
        if n_ctx > fields["n_ctx"]:
            raise LoadError(f"n_ctx={n_ctx}: this model has {fields['n_ctx']} position embeddings")
        fields["n_ctx"] = n_ctx
        weights = {k: x[:n_ctx] if k == "pos_embed.W_pos" else x for k, x in weights.items()}
    if tokenizer is None:
        tokenizer = load_tokenizer(found.place, found.local, None) if found.local else None
        if tokenizer is None and fields["tokenizer_name"]:
            tokenizer = load_tokenizer(*resolve(fields["tokenizer_name"]), None)
    own = next((x.dtype for x in weights.values() if x.is_floating_point()), torch.float32)
    fields |= {"dtype": dtype or own, "device": "cpu", "init_weights": False}
    device = default_device() if device is None else device
    return Loaded(HookedTransformerConfig(**fields), None, tokenizer, device, dtype, weights)


def _shorten_positions(conversion: Conversion, n_ctx: int) -> None:
    """Keep the first ``n_ctx`` position embeddings, where positions are learned."""
    if conversion.pos_embed is None:
        return
    W_pos = conversion.pos_embed.W_pos
    if n_ctx > W_pos.shape[0]:
        raise LoadError(f"n_ctx={n_ctx}: this model has {W_pos.shape[0]} position embeddings")
    conversion.pos_embed.put("W_pos", W_pos[:n_ctx], None, "")


def _name_of(model: Any) -> str:
    named = (vars(model).get("name_or_path"), hf.find(model, "config._name_or_path"))
    kind = hf.find(model, "config.model_type") or type(model).__name__
    return str(next((name for name in named if name), kind))


def _from_files(
    path: str,
    local: bool,
    name: str,
    dtype: torch.dtype | None,
    revision: str | None,
    first_n_layers: int | None,
    kwargs: dict[str, Any],
) -> nn.Module:
    options: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype, **kwargs}
    if local:
        options["local_files_only"] = True
    elif revision is not None:
        options["revision"] = revision
    try:
        if first_n_layers is not None:
            where = {k: v for k, v in options.items() if k != "dtype"}
            config = AutoConfig.from_pretrained(path, **where)
            options["config"] = shortened(config, first_n_layers)
        with _without_advice(first_n_layers is not None):
            model, report = _auto_class(path, options).from_pretrained(
                path, output_loading_info=True, **options
            )
        if missing := sorted(report["missing_keys"]):
            raise LoadError(
                f"{path!r} has no {', '.join(missing[:3])}"
                + (f" nor {len(missing) - 3} more" if len(missing) > 3 else "")
                + ": transformers would make these weights up. To use them so, load the module "
                "yourself and pass it."
            )
        return model.eval()
    except LoadError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        if local or not isinstance(error, OSError):
            why = " ".join(str(error).split())
            raise LoadError(f"can't read a causal language model from {path!r}: {why}") from error
        close = nearest(name, [*ALIASES, "gpt2", "demo"])
        hint = f" Short names near it: {', '.join(close)}." if close else ""
        raise LoadError(
            f"no model {name!r}: it is neither a folder nor reachable on the hub (offline, or "
            f"misspelt).{hint} Without a network, 'demo' and local folders work."
        ) from error


WHERE = (
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)
"""Options that say how a file is found."""


def _auto_class(path: str, options: dict[str, Any]) -> Any:
    """The Auto class for a checkpoint: by its config, where transformers can read that."""
    config = options.get("config")
    if config is None:
        try:
            where = {name: options[name] for name in WHERE if name in options}
            config = AutoConfig.from_pretrained(path, **where)
        except (OSError, ValueError, KeyError):
            return AutoModelForCausalLM  # whose own words will do
    return auto_class(config)


@contextmanager
def _without_advice(wanted: bool) -> Iterator[None]:
    """Keep transformers from listing the weights of layers that were not wanted."""
    verbosity = logging.get_verbosity()
    if wanted:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def shortened(config: Any, n: int) -> Any:
    """``config`` with its first ``n`` layers, in place; raises LoadError if it has fewer."""
    text = config.get_text_config()
    if not 0 < n <= text.num_hidden_layers:
        raise LoadError(f"first_n_layers={n}: this model has {text.num_hidden_layers} layers")
    text.num_hidden_layers = n
    return config


def load_tokenizer(path: str, local: bool, revision: str | None) -> Any:
    """The tokenizer kept beside a model, or None when there is none to be had."""
    if local and not any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
        return None  # transformers would make an empty one up
    options: dict[str, Any] = {"local_files_only": True} if local else where_found({})
    if revision is not None and not local:
        options["revision"] = revision
    try:
        return AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError):
        return None
