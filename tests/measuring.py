"""What a converted model of any type does, measured against Hugging Face's: for the survey."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from hook_sets import dead, said
from sizes import IDS, VOCAB, merged, sizes_of, variants_of
from tiny import perturb, quiet_transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import hookedlm
from hookedlm import HookedTransformer

FIRST = 3  # ids below are special
N_NEW = 4
CLOSE = 1e-5
"""Relative error in float32 that counts as equal."""
REFUSED = "InputError: the stream of this model is no sum"
"""What the cache says of a model whose blocks are lent to Hugging Face's loop."""
THEIRS = "Hugging Face itself: "
"""What transformers can't do with a type."""
KEPT = 1e-4
"""How far processing may move a log-probability, in nats."""


@dataclass
class Result:
    """One configuration of a type. Numbers are errors; texts say what went wrong."""

    kind: str
    variant: str
    crash: str = ""
    opaque: list[str] = field(default_factory=list)
    halved: list[str] = field(default_factory=list)
    """Parts that have another form in bfloat16 than in float32."""
    forms: list[str] = field(default_factory=list)
    points: list[str] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)
    numbers: dict[str, float | str] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)
    """How far Hugging Face's own float32 is from its float64, where a number is that large."""
    generation: dict[str, bool | str] = field(default_factory=dict)

    @property
    def uniform(self) -> bool:
        """Whether every part has its uniform form."""
        return not self.crash and not self.opaque

    def troubles(self) -> list[str]:
        """Everything that is not as it should be, a text each."""
        if self.crash:
            return [self.crash]
        limits = {what: 2 * each for what, each in self.rounding.items()}  # two runs differ by both
        for what, limit in {"processing": KEPT, "bfloat16": 0.2}.items():
            limits[what] = max(limit, limits.get(what, 0.0))
        found = []
        for what, error in self.numbers.items():
            if isinstance(error, str):
                found += [] if error.startswith((REFUSED, THEIRS)) else [f"{what}: {error}"]
            elif not error <= max(CLOSE, limits.get(what, 0.0)):
                found.append(f"{what} {error:.0e}")
        found += [f"{how}: {same}" for how, same in self.generation.items() if same is not True]
        found += [f"in bfloat16 {part}" for part in self.halved]
        if self.dead:
            found.append(f"{len(self.dead)} hooks: {', '.join(self.dead[:3])}")
        return found


def config_of(kind: str, variant: str = "base") -> Any:
    """A small configuration; of a variant, with those of its options that transformers runs."""
    with quiet_transformers():
        return AutoConfig.for_model(kind, **merged(IDS | sizes_of(kind), options_of(kind, variant)))


@cache
def options_of(kind: str, variant: str) -> dict[str, Any]:
    """A variant's options, without those with which plain Hugging Face cannot be built or run."""
    if variant == "base":
        return {}
    options = variants_of(kind)[variant]
    if runs(kind, options):
        return options
    kept: dict[str, Any] = {}
    for key, value in options.items():
        if runs(kind, kept | {key: value}):
            kept[key] = value
    return kept


@torch.no_grad()
def runs(kind: str, options: dict[str, Any]) -> bool:
    """Whether plain Hugging Face builds this configuration and has logits for tokens."""
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            config = AutoConfig.for_model(kind, **merged(IDS | sizes_of(kind), options))
            model = AutoModelForCausalLM.from_config(config).eval()
            return bool(model(tokens_for(model)).logits.shape)
    except Exception:  # whatever it raises, nothing could be compared
        return False


def model_of(kind: str, variant: str = "base", dtype: torch.dtype = torch.float32) -> Any:
    """A tiny random model of any type, every parameter perturbed."""
    config = config_of(kind, variant)
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    perturb(model, 0)
    return model


def measure(kind: str, variant: str = "base") -> Result:
    """Everything the survey tells of one configuration; a crash is told, not raised."""
    result = Result(kind, variant)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            theirs = model_of(kind, variant)
            ours = hookedlm.load(theirs)
            tokens = tokens_for(theirs)
            mine, logits = ours(tokens), theirs(tokens).logits
            result.numbers["float32"] = _error(mine, logits)
        except Exception as error:
            result.crash = said(error)
            return result
        _parts(result, ours)
        _try(result, "padded", lambda: padded_error(theirs, ours, tokens))
        _try(result, "bfloat16", lambda: bfloat16_error(result, ours, tokens))
        _try(result, "listening", lambda: listening_error(ours, tokens, logits))
        result.dead = dead(ours, tokens)
        _try(result, "decomposition", lambda: decomposition_error(ours, tokens, full=False))
        _try(result, "full decomposition", lambda: decomposition_error(ours, tokens, full=True))
        _try(result, "processing", lambda: processing_error(kind, theirs, ours, tokens))
        if result.troubles():
            result.rounding = rounding_of(theirs, tokens, logits)
        _generation(result, theirs, ours, tokens[:1])
    return result


def tokens_for(model: Any) -> Tensor:
    """Two rows of ids that are neither special nor beyond the vocabulary."""
    size = min(VOCAB, model.get_input_embeddings().weight.shape[0])
    return torch.randint(FIRST, size, (2, 9), generator=torch.Generator().manual_seed(1))


def _parts(result: Result, ours: HookedTransformer) -> None:
    parts = ours.fidelity().parts
    result.forms = [part.form for part in parts if part.where.startswith("blocks")]
    result.opaque = sorted({f"{p.form}: {p.reason}" for p in parts if "opaque" in p.form})
    result.points = list(ours.hook_dict)


def _error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-9))


def _try(result: Result, what: str, error: Callable[[], float]) -> None:
    try:
        result.numbers[what] = error()
    except Exception as failed:
        text = said(failed)
        result.numbers[what] = (
            text.removeprefix("NotImplementedError: ") if THEIRS in text else text
        )


def padded_error(theirs: Any, ours: HookedTransformer, tokens: Tensor) -> float:
    """The worst error at real positions of a batch padded on the left."""
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    pad = theirs.config.get_text_config().pad_token_id
    tokens = tokens.masked_fill(mask == 0, 0 if pad is None else pad)
    given: dict[str, Any] = {"attention_mask": mask}
    if "position_ids" in inspect.signature(theirs.forward).parameters and not _own_positions(
        theirs
    ):
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    real = mask.bool()
    return _error(ours(tokens, attention_mask=mask)[real], theirs(tokens, **given).logits[real])


def _own_positions(model: Any) -> bool:
    """Whether a family counts positions itself, from the ids of padding (RoBERTa)."""
    return any(
        "create_position_ids_from_input_ids" in vars(type(module)) for module in model.modules()
    )


def bfloat16_error(result: Result, ours: HookedTransformer, tokens: Tensor) -> float:
    """The error of the median position: routers may fall another way at single ones. Told besides:
    parts that are not in bfloat16 what they are in float32."""
    theirs = model_of(result.kind, result.variant, torch.bfloat16)
    try:
        logits = theirs(tokens).logits.float()
    except RuntimeError as error:
        raise NotImplementedError(f"{THEIRS}{said(error)}") from error
    half = hookedlm.load(theirs)
    result.halved = other_forms(half, ours)
    mine = half(tokens).float()
    worst = (mine - logits).abs().amax(-1).flatten().median()
    return float(worst / logits.abs().max().clamp(min=1e-9))


def other_forms(ours: HookedTransformer, other: HookedTransformer) -> list[str]:
    """Parts of a model that have another form than the same part of another model."""
    forms = {part.where: part.form for part in other.fidelity().parts}
    return [
        f"{part.where} is {part.form} ({part.reason})"
        for part in ours.fidelity().parts
        if forms.get(part.where) != part.form
    ]


def listening_error(ours: HookedTransformer, tokens: Tensor, logits: Tensor) -> float:
    """How far logits are from Hugging Face's while every point is observed."""
    found, _ = ours.run_with_cache(tokens, names_filter=list(ours.hook_dict))
    return _error(found, logits)


def rounding_of(theirs: Any, tokens: Tensor, logits: Tensor) -> dict[str, float]:
    """How far Hugging Face's float32 is from its own float64, or moves when each weight of its
    embedding is rounded another way, whichever is more."""
    noisy = copy.deepcopy(theirs)
    table = noisy.get_input_embeddings().weight.data
    ulp = torch.finfo(torch.float32).eps
    table *= 1 + ulp * torch.randn(table.shape, generator=torch.Generator().manual_seed(3))
    others = [noisy(tokens).logits]
    with suppress(RuntimeError):  # some kernels and masks have no float64
        others.append(copy.deepcopy(theirs).double()(tokens).logits)
    wide = logits.double()
    nats_of = [(x.log_softmax(-1) - wide.log_softmax(-1)).abs().max() for x in others]
    moved = [_error(wide, x.double()) for x in others]
    return {"listening": max(moved), "processing": float(max(nats_of))}


def decomposition_error(ours: HookedTransformer, tokens: Tensor, full: bool) -> float:
    """How far the parts' sum is from the last stream, relative to it."""
    _, cache = ours.run_with_cache(tokens)
    whole = cache[f"blocks.{ours.cfg.n_layers - 1}.hook_resid_post"]
    parts = cache.get_full_resid_decomposition() if full else cache.decompose_resid()
    return _error(parts.sum(0), whole)


def processing_error(kind: str, theirs: Any, ours: HookedTransformer, tokens: Tensor) -> float:
    """How far the classic door's processing moves log-probabilities."""
    processed = HookedTransformer.from_pretrained(kind, hf_model=theirs)
    before, after = (model(tokens).log_softmax(-1) for model in (ours, processed))
    return float((after - before).abs().max())


def _generation(result: Result, theirs: Any, ours: HookedTransformer, tokens: Tensor) -> None:
    """Greedy generation with a key-value cache and without, against the likeliest tokens of Hugging
    Face's forward pass (its own ``generate`` numbers some families' positions another way)."""
    how = {"max_new_tokens": N_NEW, "min_new_tokens": N_NEW, "do_sample": False}
    end = theirs.generation_config.eos_token_id
    ends = torch.tensor([] if end is None else [end] if isinstance(end, int) else end).long()
    truth = tokens
    for _ in range(N_NEW):
        last = theirs(truth).logits[:, -1].index_fill(1, ends, -torch.inf)
        truth = torch.cat([truth, last.argmax(-1, keepdim=True)], dim=1)
    for cached in (True, False):
        name = f"generation {'with' if cached else 'without'} cache"
        try:
            with quiet_transformers():
                told = ours.generate(tokens, use_past_kv_cache=cached, verbose=False, **how)
            same = torch.equal(told, truth)
            if cached and not same:  # some caches of Hugging Face's change what it says
                theirs.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=0)
                same = torch.equal(told, theirs.generate(tokens, **how))
            result.generation[name] = bool(same)
        except Exception as error:
            result.generation[name] = said(error)


def nats(error: float | str) -> str:
    """An error as the table shows it."""
    if isinstance(error, str):
        return error
    return "exact" if error == 0 else "nan" if math.isnan(error) else f"{error:.0e}"
