"""Changes of the weights that leave the model's predictions alone, and make it easier to read.

Each computes in float32 (or better), copies only what it changes, compares log-probabilities before
and after on a small padded batch, and writes itself into ``model.history``. What would be wrong for
a family is skipped and said, or refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hookedlm.errors import ProcessingError
from hookedlm.factored_matrix import FactoredMatrix
from hookedlm.layers.attention import Attention
from hookedlm.layers.attention_math import repeat_heads
from hookedlm.layers.block import AttentionBranch, PostNormBlock
from hookedlm.layers.hybrid import NormedStreamBlock
from hookedlm.layers.latent import LatentAttention, SparseLatentAttention
from hookedlm.layers.mlp import MLP, GatedMLP
from hookedlm.layers.moe import MoE
from hookedlm.layers.norm import Norm, Same

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer

TOLERANCE = 1e-4
"""Largest change of a log-probability, in nats, that a transform may cause in float32; more where
they are tens of nats away from zero on average, because rounding alone moves those."""


@dataclass
class Record:
    """One entry of ``model.history``: what was done, and what was left alone and why."""

    name: str
    skipped: list[str] = field(default_factory=list)
    change: float = 0.0

    def __str__(self) -> str:
        done = f"{self.name} (log-probs moved by {self.change:.1e})"
        return done + "".join(f"\n  left alone: {reason}" for reason in self.skipped)


@dataclass(frozen=True)
class Reader:
    """A weight that reads the stream: ``axis`` is its d_model axis, ``bias`` what it adds."""

    module: nn.Module
    name: str
    axis: int
    bias: str | None


# Applying -----------------------------------------------------------------------------------------


@torch.no_grad()
def probe(model: HookedTransformer) -> Tensor:
    """Log-probabilities of a small padded batch, real positions only."""
    # Here, as that module imports this one. Not model(tokens): a subclass may return what it likes.
    from hookedlm import model as whole

    n = min(9, model.cfg.n_ctx)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(model.cfg.d_vocab, (2, n), generator=generator).to(model.device)
    mask = torch.ones_like(tokens)
    mask[1, : n // 3] = 0
    logits = whole.HookedTransformer.forward(model, tokens, attention_mask=mask)
    return logits[mask.bool()].float().log_softmax(-1)


@contextmanager
def recorded(model: HookedTransformer, name: str) -> Iterator[Record]:
    """Run a transform: on exit its effect is measured; a wrong one is undone and raised."""
    record = Record(name)
    before = probe(model)
    saved = [(m, dict(m._parameters), dict(m._modules)) for m in model.modules()]
    described = model.cfg.to_dict()
    try:
        with torch.no_grad():
            yield record
        record.change = float((probe(model) - before).abs().max())
        limit = TOLERANCE * float((before.abs().mean() / 10).clamp(min=1.0))
        if model.dtype in (torch.float16, torch.bfloat16):  # rounding of weights alone moves them
            limit = 16 * torch.finfo(model.dtype).eps * float(before.abs().max().clamp(min=1.0))
        if not record.change <= limit:
            raise ProcessingError(
                f"{name} would change log-probabilities by {record.change:.2e} (allowed: "
                f"{limit:.0e}); nothing was changed."
            )
    except BaseException:
        for module, parameters, modules in saved:
            module._parameters.clear()
            module._parameters.update(parameters)
            module._modules.clear()
            module._modules.update(modules)
        vars(model.cfg).update(described)
        model.setup()
        raise
    model.history.append(record)


def wide(x: Tensor) -> Tensor:
    """In float32, or in float64 where it already is."""
    return x if x.dtype == torch.float64 else x.float()


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a module a new weight in the dtype of the old one."""
    old = module._parameters[name]
    dtype = value.dtype if old is None else old.dtype
    trains = old is None or old.requires_grad
    module._parameters[name] = nn.Parameter(value.to(dtype), requires_grad=trains)


def add_bias(module: nn.Module, name: str, value: Tensor, like: str) -> None:
    """Add to a bias that may not exist yet."""
    old, beside = module._parameters[name], module._parameters[like]
    assert beside is not None
    new = value if old is None else wide(old) + value
    module._parameters[name] = nn.Parameter(
        new.to(beside.dtype), requires_grad=beside.requires_grad
    )


# Fold LayerNorm -----------------------------------------------------------------------------------


def fold_ln(
    model: HookedTransformer, fold_biases: bool = True, center_weights: bool = True
) -> Record:
    """Move norm weights (and biases) into the matrices that read the normed stream.

    After it a norm only divides by its scale (LayerNorm: centres and divides). ``center_weights``
    also removes from LayerNorm's readers the direction LayerNorm never shows them.
    """
    with recorded(model, "fold_ln") as record:
        for where, norm, readers, why_not in _norms_and_readers(model):
            if norm.live("w") is None and norm.live("b") is None:
                continue
            if why_not:
                record.skipped.append(f"{where}: {why_not}")
                continue
            if norm.live("b") is not None and not fold_biases:
                record.skipped.append(f"{where}: it has a bias and fold_biases is off")
                continue
            _fold(norm, readers, center_weights)
        kind = {"LN": "LNPre", "RMS": "RMSPre"}
        if not record.skipped:
            now = model.cfg.normalization_type
            model.cfg.normalization_type = kind.get(now or "", now)
    return record


def _fold(norm: Norm, readers: list[Reader], center_weights: bool) -> None:
    b = norm.live("b")
    for reader in readers:
        W = reader.module._parameters[reader.name]
        assert W is not None
        if b is not None and reader.bias is not None:
            constant = torch.tensordot(wide(b), wide(W), dims=([0], [reader.axis]))
            add_bias(reader.module, reader.bias, constant, reader.name)
        shape = [1] * W.ndim
        shape[reader.axis] = -1
        new = wide(W) * wide(norm.weight).reshape(shape)
        if norm.spec.centres and center_weights:
            new = new - new.mean(reader.axis, keepdim=True)
        put(reader.module, reader.name, new)
    norm._parameters["w"] = norm._parameters["b"] = None


def _norms_and_readers(
    model: HookedTransformer,
) -> Iterator[tuple[str, Norm, list[Reader], str]]:
    """(where, norm, what reads it, why it can't be folded) for every norm that reads the stream."""
    for i, block in enumerate(model.blocks):
        if not isinstance(block, AttentionBranch):
            continue
        for norm_name, part in (("ln1", "attn"), ("ln2", "mlp")):
            norm = block._modules.get(norm_name)
            if not isinstance(norm, Norm):
                continue
            readers, why_not = _readers(block._modules.get(part), norm)
            if norm_name == "ln1" and "mixer" in block._modules:
                why_not = "a mixer that runs as Hugging Face wrote it reads it"
            if isinstance(block, (PostNormBlock, NormedStreamBlock)):
                why_not = "it normalises the stream itself, which everything later reads"
            yield f"blocks.{i}.{norm_name}", norm, readers, why_not
    if isinstance(model.ln_final, Norm) and model.unembed is not None:
        readers = [Reader(model.unembed, "W_U", 0, "b_U")]
        if "mlm_head" in model._modules:
            readers = [Reader(model.mlm_head, "W", 0, "b")]
        why_not = ""
        if model.unembed.live("W_proj") is not None:
            readers = [Reader(model.unembed, "W_proj", 0, None)]
            why_not = "its bias passes a projection" if model.ln_final.live("b") is not None else ""
        yield "ln_final", model.ln_final, readers, why_not


def _readers(part: nn.Module | None, norm: Norm) -> tuple[list[Reader], str]:
    if isinstance(part, SparseLatentAttention) and part.select is not None:
        return [], "a selector of keys that runs as Hugging Face wrote it reads it"
    if isinstance(part, Attention):
        return _attention_readers(part), ""
    if isinstance(part, MLP):
        return [Reader(part, "W_in", 0, "b_in")], ""
    if isinstance(part, GatedMLP):
        return [Reader(part, "W_gate", 0, "b_gate"), Reader(part, "W_in", 0, "b_in")], ""
    if isinstance(part, MoE):
        return _expert_readers(part, norm)
    return [], "what reads it runs as Hugging Face wrote it"


def _attention_readers(attn: Attention) -> list[Reader]:
    own = [x for x in "QKV" if attn._parameters[f"W_{x}"] is not None]
    readers = [Reader(attn, f"W_{x}", 1, f"b_{x}") for x in own]
    if isinstance(attn, LatentAttention):
        queries = readers[0] if attn.live("W_DQ") is None else Reader(attn, "W_DQ", 0, "b_DQ")
        readers = [queries, Reader(attn, "W_DKV", 0, "b_DKV")]
    gate = attn._modules.get("gate")
    return readers if gate is None else [*readers, Reader(gate, "W_gate", 1, "b_gate")]


def _expert_readers(moe: MoE, norm: Norm) -> tuple[list[Reader], str]:
    if norm.live("b") is not None:
        return [], "its bias has no place in a router"
    readers = [
        Reader(module, name, 0 if name == "W_router" else 1, None)
        for part in (moe.router, moe.shared_gate if moe.shared is not None else None)
        if part is not None
        for module in part.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 2 and parameter.shape[name != "W_router"] == moe.spec.d_model
    ]
    if not readers:
        return [], "its router has no matrix"
    n = len(readers)
    for module in moe.experts.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim != 3 or "down" in name or name == "W_out":
                continue
            axes = [axis for axis in (1, 2) if parameter.shape[axis] == moe.spec.d_model]
            if len(axes) != 1:
                return [], f"experts.{name} does not tell which axis is d_model"
            readers.append(Reader(module, name, axes[0], None))
    if len(readers) == n:
        return [], "its experts keep their weights elsewhere"
    return readers + ([] if moe.shared is None else _readers(moe.shared, norm)[0]), ""


# Centre -------------------------------------------------------------------------------------------


def why_writing_matters(model: HookedTransformer) -> str:
    """Why the mean of what is written into the stream matters here; "" if it does not."""
    for i, block in enumerate(model.blocks):
        if not isinstance(block, AttentionBranch):
            return f"block {i} reads the stream in its own way"
        if isinstance(block, PostNormBlock):
            return f"block {i} reads the stream before any norm"
        for name in ("ln1", "ln2"):
            norm = block._modules.get(name)
            if norm is not None and not (isinstance(norm, Norm) and norm.spec.centres):
                kind = norm.spec.kind if isinstance(norm, Norm) else "no norm"
                return f"blocks.{i}.{name} ({kind}) does not subtract the mean"
    final = model.ln_final
    if not (isinstance(final, Norm) and final.spec.centres):
        return "the final norm does not subtract the mean"
    return ""


def center_writing_weights(model: HookedTransformer) -> Record:
    """Remove from everything that writes to the stream the mean over d_model, which every
    LayerNorm removes anyway. Raises ProcessingError where a norm does not (RMSNorm)."""
    if why := why_writing_matters(model):
        raise ProcessingError(f"center_writing_weights would be wrong here: {why}.")
    with recorded(model, "center_writing_weights") as record:
        writers: list[tuple[nn.Module | None, str, int]] = [(model.pos_embed, "W_pos", 1)]
        embed = model.embed
        if embed is not None and isinstance(embed.ln, Same):
            name = "W_E" if embed.live("W_proj") is None else "W_proj"
            writers.append((embed, name, 1))
        elif embed is not None:
            record.skipped.append("embed: a norm stands behind it")
        for i, block in enumerate(model.blocks):
            for part, W, axis, b in (("attn", "W_O", 2, "b_O"), ("mlp", "W_out", 1, "b_out")):
                module = block._modules.get(part)
                if isinstance(module, (Attention, MLP, GatedMLP)):
                    writers += [(module, W, axis), (module, b, 0)]
                elif module is not None:
                    record.skipped.append(f"blocks.{i}.{part}: not uniform")
        for module, name, axis in writers:
            value = None if module is None else module._parameters[name]
            if module is not None and value is not None:
                put(module, name, wide(value) - wide(value).mean(axis, keepdim=True))
    return record


def center_unembed(model: HookedTransformer) -> Record:
    """Remove from ``W_U`` and ``b_U`` the mean over the vocabulary, which softmax ignores.

    Raises ProcessingError under a softcap, which does not.
    """
    if model.unembed is None or model.unembed.softcap is not None:
        raise ProcessingError(
            "center_unembed would be wrong here: "
            + ("the head is opaque." if model.unembed is None else "logits pass a softcap.")
        )
    with recorded(model, "center_unembed") as record:
        unembed = model.unembed
        W, b = wide(unembed.W_U), unembed.live("b_U")
        put(unembed, "W_U", W - W.mean(1, keepdim=True))
        if b is not None:
            put(unembed, "b_U", wide(b) - wide(b).mean())
    return record


# Attention ----------------------------------------------------------------------------------------


def _uniform_attention(
    model: HookedTransformer, record: Record, why_not: Callable[[Attention], str]
) -> Iterator[Attention]:
    for i, block in enumerate(model.blocks):
        attn = block._modules.get("attn")
        if not isinstance(attn, Attention):
            record.skipped.append(f"blocks.{i}: attention is not uniform")
        elif reason := why_not(attn):
            record.skipped.append(f"blocks.{i}.attn: {reason}")
        else:
            yield attn


def _value_bias_matters(attn: Attention) -> str:
    if attn.spec.sinks:
        return "a sink takes part of each row, so value biases are not added in full"
    if attn.finishes or "v_norm" in attn._modules:
        return "a gate or a norm stands between values and what heads write"
    return "values are clipped after the bias" if attn.spec.clip is not None else ""


def fold_value_biases(model: HookedTransformer) -> Record:
    """Move ``b_V W_O`` into ``b_O``: attention rows sum to one, so every head adds it in full."""
    with recorded(model, "fold_value_biases") as record:
        for attn in _uniform_attention(model, record, _value_bias_matters):
            b_V = attn.live("b_V")
            if b_V is None:
                continue
            per_head = attn.spec.value_scale * repeat_heads(wide(b_V), attn.spec.n_heads, dim=0)
            add_bias(attn, "b_O", torch.einsum("he,hed->d", per_head, wide(attn.W_O)), "W_O")
            put(attn, "b_V", torch.zeros_like(b_V))
    return record


def refactor_factored_attn_matrices(model: HookedTransformer) -> Record:
    """Rewrite each head in its singular directions: ``W_Q W_Kᵀ`` split evenly, ``W_O`` orthonormal.

    Source: "A Mathematical Framework for Transformer Circuits" (2021), on QK and OV as the only
    things a head computes with. Skipped where q and k are rotated, normed, grouped or clipped.
    """

    def why_not(attn: Attention) -> str:
        spec = attn.spec
        for present, reason in (
            (spec.rotary, "positions rotate queries and keys"),
            (spec.qk_norm is not None, "queries and keys are normed"),
            (spec.n_kv_heads != spec.n_heads, "queries are grouped"),
            (spec.clip is not None, "queries, keys and values are clipped"),
            (spec.sinks, "a sink competes with the scores' scale"),
            (attn.finishes, "a gate or a norm stands before W_O"),
        ):
            if present:
                return reason
        return attn.why_not_bilinear()

    with recorded(model, "refactor_factored_attn_matrices") as record:
        for attn in _uniform_attention(model, record, why_not):
            _refactor(attn)
    return record


def _refactor(attn: Attention) -> None:
    dtype = torch.float32 if attn.W_Q.device.type == "mps" else torch.float64
    stored = attn.W_Q.dtype
    W = {name: attn._parameters[name].to(dtype) for name in ("W_Q", "W_K", "W_V", "W_O")}
    b = {
        name: torch.zeros_like(W[f"W_{name[-1]}"][:, 0])
        if attn.live(name) is None
        else attn.live(name).to(dtype)
        for name in ("b_Q", "b_K", "b_V")
    }
    q, k = (torch.cat([W[f"W_{x}"], b[f"b_{x}"][:, None]], dim=1) for x in "QK")
    even = FactoredMatrix(q, k.transpose(-2, -1)).make_even()
    q, k = even.A, even.B.transpose(-2, -1)
    add_bias(attn, "b_O", torch.einsum("he,hed->d", b["b_V"], W["W_O"]), "W_O")
    U, S, Vh = FactoredMatrix(W["W_V"], W["W_O"]).svd()
    for name, value in (
        ("W_Q", q[:, :-1]),
        ("W_K", k[:, :-1]),
        ("W_V", U * S[:, None, :]),
        ("W_O", Vh.transpose(-2, -1)),
        ("b_Q", q[:, -1]),
        ("b_K", k[:, -1]),
        ("b_V", torch.zeros_like(b["b_V"])),
    ):
        put(attn, name, value.contiguous().to(stored))


# Remove norms -------------------------------------------------------------------------------------


def remove_layernorm(model: HookedTransformer) -> Record:
    """Take out norms that divide by a constant: those of models trained to do without.

    Such models keep LayerNorm modules whose eps dwarfs the variance (arXiv 2507.02559), so that
    ``scale = sqrt(eps)``. It, the weight, the bias and the centring move into the matrices behind.
    Raises ProcessingError if a norm's scale still depends on its input.
    """
    with recorded(model, "remove_layernorm") as record:
        for where, norm, readers, why_not in list(_norms_and_readers(model)):
            if why_not or not norm.eps > 1e4:
                raise ProcessingError(
                    f"remove_layernorm: {where} "
                    + (why_not or f"has eps={norm.eps:g}: its scale depends on the stream")
                )
            constant = torch.full_like(wide(norm.weight), norm.eps**-0.5)
            put(norm, "w", wide(norm.weight) * constant)
            _fold(norm, readers, center_weights=True)
            parent = model.get_submodule(where.rpartition(".")[0])
            parent._modules[where.rpartition(".")[2]] = Same()
        model.setup()
        model.cfg.normalization_type = None
    return record
