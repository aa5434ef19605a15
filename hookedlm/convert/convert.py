"""Convert: read, build and check every part of a Hugging Face causal LM, and say what was found."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hookedlm.convert import hf
from hookedlm.convert.build import Block, build_read_block
from hookedlm.convert.check import Truth, check_block, compare, run_truth, within
from hookedlm.convert.hf import ConfigReads, Coverage, MissingPartError
from hookedlm.convert.prepare import BlockCall, Call, CallRecorder, HFPreparer
from hookedlm.convert.read import (
    AttentionReading,
    BlockReading,
    OpaqueReading,
    read_block,
    read_norm,
)
from hookedlm.convert.report import Agreement, Fidelity, PartReport
from hookedlm.convert.tail import OpaqueTail
from hookedlm.errors import ConversionError, HookedLMError
from hookedlm.families import FAMILIES, GUESSES, Row
from hookedlm.layers.embed import Embed, PosEmbed, Unembed
from hookedlm.layers.norm import Norm
from hookedlm.layers.opaque import OpaqueBlock, OpaqueNorm
from hookedlm.spec import OpaqueSpec


@dataclass
class Conversion:
    """The layers of a converted model, and everything needed to run them."""

    own: Any
    """Our copy of Hugging Face's modules: embeddings, positions, masks and opaque parts live here."""
    row: Row
    embed: Embed | None
    pos_embed: PosEmbed | None
    blocks: list[Block]
    ln_final: nn.Module | None
    unembed: Unembed | None
    tail: OpaqueTail | None
    preparer: HFPreparer
    fidelity: Fidelity


def convert(model: nn.Module, strict: bool = False) -> Conversion:
    """Uniform layers on ``model``'s own tensors, each compared with the original.

    Raises ConversionError when the model can't be run block by block, or when ``strict`` and a part
    had to be wrapped. ``model`` itself is neither changed nor kept.
    """
    try:
        return _converted(model, strict)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, HookedLMError):
            raise
        raise ConversionError(
            f"{type(model).__name__} could not be run block by block: "
            f"{type(error).__name__}: {error}"
        ) from error


def _converted(model: nn.Module, strict: bool) -> Conversion:
    own = hf.skeleton(model).eval()
    config = ConfigReads(own.config)
    row, family = _row_of(own)
    layers = list(hf.at(own, row.blocks))
    truth = run_truth(own, layers, own.get_input_embeddings().weight.shape[0])
    if len(truth.calls) != len(layers):
        raise ConversionError(
            f"{type(model).__name__} runs its {len(layers)} blocks {len(truth.calls)} times in one "
            "pass; a model that loops over its blocks has no uniform form yet."
        )
    if truth.calls[0].hidden.ndim != 3:
        raise ConversionError(
            f"{type(model).__name__} keeps several streams {tuple(truth.calls[0].hidden.shape)}; "
            "only one residual stream [batch, pos, d_model] has a uniform form yet."
        )
    fidelity = Fidelity(
        own.config.model_type, type(model).__name__, str(truth.logits.dtype)[6:], family
    )
    embed, pos_embed = _embedding(own, row, config, truth, fidelity)
    blocks, calls = _blocks(layers, row, config, truth, fidelity)
    ln_final, unembed = _reading_out(own, row, config)
    conversion = Conversion(
        own,
        row,
        embed,
        pos_embed,
        blocks,
        ln_final,
        unembed,
        None,
        _preparer(own, row, layers, calls, truth, keep_norm=unembed is None),
        fidelity,
    )
    _check_logits(conversion, truth, config)
    fidelity.unread = _unread(config)
    if strict:
        fidelity.demand_uniform()
    return conversion


# Which row ----------------------------------------------------------------------------------------


def _row_of(model: Any) -> tuple[Row, str]:
    model_type = getattr(model.config, "model_type", "")
    if model_type in FAMILIES:
        return FAMILIES[model_type], model_type
    for row, name in zip(GUESSES, ("llama", "gpt2")):
        if all(hf.find(model, place) is not None for place in (row.base, row.blocks, row.embed)):
            return row, f"{name} (a guess: {model_type!r} has no row)"
    return _matched_row(
        model
    ), f"nothing known (matched by module names: {model_type!r} has no row)"


def guess_blocks(model: nn.Module) -> str:
    """The path of the list of blocks: the shortest ``*.<number>`` pattern whose modules contain a
    token mixer, occurring at least as often as any other. Raises ConversionError if none does."""
    words = re.compile(r"attn|attention|mixer|mamba|mlp|ffn|feed_forward|moe", re.I)
    found: Counter[str] = Counter()
    for name, module in model.named_modules():
        parts = name.rsplit(".", 1)
        if (
            len(parts) == 2
            and parts[1].isdigit()
            and any(words.search(child) for child, _ in module.named_modules())
        ):
            found[parts[0]] += 1
    outermost = {p: n for p, n in found.items() if not any(p.startswith(q + ".") for q in found)}
    if not outermost:
        raise ConversionError(
            f"{type(model).__name__} has no numbered list of blocks with attention or a mixer in "
            "them; hookedlm can't tell where its residual stream runs."
        )
    return max(outermost, key=lambda path: (outermost[path], -len(path)))


def _matched_row(model: Any) -> Row:
    blocks = guess_blocks(model)
    parent = blocks.rsplit(".", 1)[0] if "." in blocks else ""
    names = {id(module): name for name, module in model.named_modules()}
    children = list(hf.at(model, parent).named_children() if parent else model.named_children())
    base = parent
    while (
        "." in base and "input_ids" not in inspect.signature(hf.at(model, base).forward).parameters
    ):
        base = base.rsplit(".", 1)[0]
    after = children[[name for name, _ in children].index(blocks.rsplit(".", 1)[-1]) + 1 :]
    norms = [
        name for name, child in after if re.search(r"norm|ln", name) and not list(child.children())
    ]
    embed = names.get(id(model.get_input_embeddings()))
    head = names.get(id(model.get_output_embeddings()))
    if embed is None or head is None or not parent:
        raise ConversionError(f"{type(model).__name__} does not tell its embedding or its head")
    return Row(
        base=base,
        blocks=blocks,
        embed=embed,
        unembed=head,
        attn=None,
        mlp=None,
        ln1=None,
        ln2=None,
        ln_final=f"{parent}.{norms[0]}" if norms else None,
    )


# The parts ----------------------------------------------------------------------------------------


def _embedding(
    own: nn.Module, row: Row, config: ConfigReads, truth: Truth, fidelity: Fidelity
) -> tuple[Embed | None, PosEmbed | None]:
    table = hf.at(own, row.embed)
    proj, ln = hf.find(own, row.embed_proj), hf.find(own, row.embed_norm)
    position = hf.find(own, row.pos_embed)
    norm = None
    if ln is not None:
        reading = read_norm(ln, row, config, Coverage(ln))
        norm = Norm(reading.spec, reading.w, reading.b)
    scale = hf.resolved(row.embed_scale, own, config)
    W_proj = None if proj is None else hf.flat_weight(proj).t()
    embed = Embed(table.weight, scale, W_proj, norm)
    pos_embed = None if position is None else PosEmbed(position.weight[row.pos_offset :])
    with torch.no_grad():
        stream = embed(truth.tokens)
        if pos_embed is not None:
            stream = stream + pos_embed(truth.position_ids)
    agreement = compare(stream, truth.calls[0].hidden, truth.real)
    if within(agreement, stream.dtype):
        fidelity.parts.append(PartReport("embed", "uniform", agreement))
        return embed, pos_embed
    reason = f"what enters block 0 is not the embedding ({agreement.error:.1e} away)"
    fidelity.parts.append(
        PartReport("embed", "opaque embedding", Agreement(0.0, True), None, reason)
    )
    return None, None


def _blocks(
    layers: list[nn.Module], row: Row, config: ConfigReads, truth: Truth, fidelity: Fidelity
) -> tuple[list[Block], list[BlockCall]]:
    blocks, calls = [], []
    for layer, module in enumerate(layers):
        block, call, part = _block(module, row, config, truth, layer)
        blocks.append(block)
        calls.append(call)
        fidelity.parts.append(part)
    return blocks, calls


def _block(
    module: nn.Module, row: Row, config: ConfigReads, truth: Truth, layer: int
) -> tuple[Block, BlockCall, PartReport]:
    """One block: uniform if it can be read completely and computes the same both ways."""
    where = f"blocks.{layer}"
    try:
        reading = read_block(module, row, config)
        block, call = build_read_block(reading), _call_of(module, row, reading)
        quiet, listening = check_block(block, call, truth, layer)
        dtype = truth.calls[layer].hidden.dtype
        if within(quiet, dtype) and within(listening, dtype):
            reason = "; ".join([*reading.notes, *_opaque_reasons(reading)])
            return block, call, PartReport(where, _form(reading), quiet, listening, reason)
        reason = f"read as a uniform block, but {max(quiet.error, listening.error):.1e} away"
    except (MissingPartError, AttributeError, KeyError, RuntimeError, TypeError) as error:
        reason = f"not read: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    opaque = OpaqueBlock(OpaqueSpec("block", reason), module)
    call = BlockCall(_argument_names(module), opaque=True)
    quiet, listening = check_block(opaque, call, truth, layer)
    return opaque, call, PartReport(where, "opaque block", quiet, listening, reason)


def _form(reading: BlockReading) -> str:
    opaque = [
        what
        for what, part in (
            ("attention", reading.attn),
            ("MLP", reading.mlp),
            ("mixer", reading.mixer),
        )
        if isinstance(part, OpaqueReading)
    ]
    if opaque:
        return f"opaque {' and '.join(opaque)} in uniform block"
    return f"uniform, {reading.spec.layout}"


def _opaque_reasons(reading: BlockReading) -> list[str]:
    parts = (reading.attn, reading.mlp, reading.mixer)
    return [part.spec.reason for part in parts if isinstance(part, OpaqueReading)]


def _argument_names(module: nn.Module) -> tuple[str, ...]:
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def _call_of(module: nn.Module, row: Row, reading: BlockReading) -> BlockCall:
    table = hf.find(module, row.mask_table)
    if table is not None and bool((table == torch.ones_like(table).tril()).all()):
        table = None  # plainly causal: the prepared mask says it already
    attn = reading.attn if isinstance(reading.attn, AttentionReading) else None
    opaque = any(isinstance(p, OpaqueReading) for p in (reading.attn, reading.mlp, reading.mixer))
    rotary = None if attn is None else attn.rotary_style
    return BlockCall(
        _argument_names(module),
        opaque=opaque,
        mask_hides=row.mask_hides,
        bias=row.bias if isinstance(row.bias, str) else None,
        n_heads=0 if attn is None else attn.spec.n_heads,
        rotary=rotary,
        attn=attn.module if attn is not None and rotary == "pairs" else None,
        mask_table=table,
    )


def _reading_out(
    own: nn.Module, row: Row, config: ConfigReads
) -> tuple[nn.Module | None, Unembed | None]:
    """The final norm and the unembedding, or (None, None) when they are not plain."""
    head, norm = hf.find(own, row.unembed), hf.find(own, row.ln_final)
    ln_final: nn.Module | None = None
    if norm is not None:
        try:
            reading = read_norm(norm, row, config, coverage := Coverage(norm))
            if coverage.left():
                raise MissingPartError("unknown parameters in the final norm")
            ln_final = Norm(reading.spec, reading.w, reading.b)
        except MissingPartError as error:
            ln_final = OpaqueNorm(OpaqueSpec("final norm", str(error)), norm)
    if not hf.is_plain_linear(head):
        return None, None
    proj = hf.find(own, row.unembed_proj)
    unembed = Unembed(
        hf.flat_weight(head).t(),
        hf.bias_of(head),
        None if proj is None else hf.flat_weight(proj).t(),
        scale=float(hf.resolved(row.logit_scale, own, config) or 1.0),
        divisor=float(hf.resolved(row.logit_divisor, own, config) or 1.0),
        softcap=hf.resolved(row.logit_softcap, own, config),
    )
    return ln_final, unembed


# Running ------------------------------------------------------------------------------------------


def _preparer(
    own: nn.Module,
    row: Row,
    layers: list[nn.Module],
    block_calls: list[BlockCall],
    truth: Truth,
    keep_norm: bool,
) -> HFPreparer:
    """Recorders in the blocks' places; what the tail does itself is taken out of the base."""
    calls: list[Call] = []
    recorders = [CallRecorder(layer, calls, truth.returned) for layer in layers]
    hf.replace_at(own, row.blocks, nn.ModuleList(recorders))
    return HFPreparer(hf.at(own, row.base), row, calls, block_calls)


def _check_logits(conversion: Conversion, truth: Truth, config: ConfigReads) -> None:
    """The last stream read out our way; if that is not Hugging Face's way, theirs is kept."""
    stream, dtype = truth.outputs[-1], truth.logits.dtype
    own, row, fidelity = conversion.own, conversion.row, conversion.fidelity
    reason = "the head is no plain matrix"
    if conversion.unembed is not None:
        with torch.no_grad():
            normed = stream if conversion.ln_final is None else conversion.ln_final(stream)
            agreement = compare(conversion.unembed(normed), truth.logits, truth.real)
        if within(agreement, dtype):
            _strip(conversion)
            fidelity.parts.append(PartReport("logits", "uniform", agreement))
            return
        reason = f"norm and unembedding give logits {agreement.error:.1e} away"
    tail = OpaqueTail(own, conversion.preparer)
    with torch.no_grad():
        logits = tail(stream, truth.tokens, truth.real.long(), truth.position_ids)
    agreement = compare(logits, truth.logits, truth.real)
    if not within(agreement, dtype):
        raise ConversionError(
            f"{type(own).__name__} does something between its blocks and its logits that could "
            f"not be reproduced ({agreement.error:.1e} away)."
        )
    conversion.tail, conversion.ln_final, conversion.unembed = tail, None, None
    fidelity.parts.append(PartReport("logits", "opaque head", agreement, None, reason))


class _Nothing(nn.Module):
    """Stands where a position embedding was: adds zero to whatever it is added to."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(())


def _strip(conversion: Conversion) -> None:
    """Take out of our copy of the base what our own layers do, so that it holds no weights."""
    own, row = conversion.own, conversion.row
    gone: list[tuple[Any, Any]] = [(row.ln_final, nn.Identity()), (row.unembed_proj, None)]
    gone.append((row.unembed, nn.Identity()))
    if conversion.embed is not None:
        gone += [(row.embed_proj, None), (row.embed_norm, nn.Identity())]
        gone += [(row.pos_embed, _Nothing()), (row.embed, nn.Identity())]
    for places, stand_in in gone:
        for place in (places,) if isinstance(places, str) else places or ():
            if hf.find(own, place) is not None:
                hf.replace_at(own, place, stand_in)


INERT = {
    "vocab_size",
    "hidden_size",
    "n_embd",
    "d_model",
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "num_key_value_heads",
    "num_kv_heads",
    "head_dim",
    "n_positions",
    "n_ctx",
    "max_position_embeddings",
    "max_seq_len",
    "architectures",
    "dtype",
    "torch_dtype",
    "model_type",
    "transformers_version",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
    "initializer_range",
    "tie_word_embeddings",
    "attention_dropout",
    "hidden_dropout",
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
    "resid_dropout",
    "embed_dropout",
    "dropout",
    "activation_dropout",
    "layerdrop",
    "residual_dropout",
    "embedding_dropout",
    "_name_or_path",
    "name_or_path",
    "task_specific_params",
    "return_dict",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "pretraining_tp",
    "word_embed_proj_dim",
    "id2label",
    "label2id",
}
"""Config keys that say sizes (read from the tensors), names, or what matters only in training."""

FROM_MODULES = {
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_epsilon",
    "norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "layer_types",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "attention_layers",
    "attention_types",
    "window_size",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "activation",
    "attention_bias",
    "mlp_bias",
    "bias",
    "use_bias",
    "enable_bias",
    "use_qkv_bias",
    "query_pre_attn_scalar",
    "attention_multiplier",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "qk_layernorm",
    "use_qk_norm",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "mlp_only_layers",
    "decoder_sparse_step",
    "residual_multiplier",
    "rotary_dim",
    "attn_config",
    "num_ln_in_parallel_attn",
    "layer_norm_elementwise_affine",
    "swiglu_limit",
    "swiglu_alpha",
    "ffn_hidden_size",
    "multi_query",
    "sliding_window_pattern",
    "_remove_final_layer_norm",
    "original_max_position_embeddings",
}
"""Config keys whose effect is read off the modules that were built with them."""


def _unread(config: ConfigReads) -> tuple[str, ...]:
    """Keys away from their class's default that no row read and that are not inert."""
    default = _defaults(config.config)
    known = config.read | INERT | FROM_MODULES
    changed = {key for key, value in config.config.to_dict().items() if default.get(key) != value}
    return tuple(sorted(key for key in changed - known if not key.startswith("_")))


def _defaults(config: Any) -> dict[str, Any]:
    """What the config's class says when nothing is given, without its advice about such a model."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return type(config)().to_dict()
    finally:
        logging.set_verbosity(verbosity)
