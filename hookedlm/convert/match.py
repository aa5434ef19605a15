"""Match: a row for a class nobody described, from how its modules are named and called.

Blocks are the numbered modules that hold a token mixer [1]. Where the embedding, the positions, the
final norm and the unembedding are is seen in one pass over three tokens: which table was asked for
them, which for 0, 1, 2, what ran behind the last block, what gave the logits. The parts of a block
are told apart by name and by the order in which they run. Where that leaves a choice there are
several rows: the check decides, as it does about every row.

[1] "Auto-matching hidden layers in PyTorch LLMs": the shortest ``*.{number}`` path that occurs once
    per layer, among those that contain attention, a mixer or an MLP.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hookedlm.convert import hf
from hookedlm.convert.calling import logits_of, tokens_name
from hookedlm.convert.placed import device_of
from hookedlm.errors import ConversionError
from hookedlm.families import Row

MIXER = re.compile(r"attn|attention|mixer|mamba|ssm|rnn", re.I)
MLP = re.compile(r"mlp|ffn|ffwd|feed_?forward|moe|experts", re.I)
N_HEADS = ("n_heads", "n_head", "num_heads", "num_attention_heads", "nhead", "heads", "h")
D_HEAD = ("head_dim", "d_head", "head_size", "d_k")
TOKENS = ((1, 0, 2),)
"""Neither ``0, 1, 2``, which positions are, nor beyond any vocabulary."""


def guess_blocks(model: nn.Module) -> str:
    """The path of the list of blocks. Raises ConversionError, naming what is missing."""
    found: Counter[str] = Counter()
    for name, module in model.named_modules():
        parts = name.rsplit(".", 1)
        if (
            len(parts) == 2
            and parts[1].isdigit()
            and any(MIXER.search(c) or MLP.search(c) for c, _ in module.named_modules())
        ):
            found[parts[0]] += 1
    outermost = {p: n for p, n in found.items() if not any(p.startswith(q + ".") for q in found)}
    if not outermost:
        raise ConversionError(
            f"{type(model).__name__} has no numbered list of blocks with attention or a mixer in "
            "them: hookedlm can't tell where its residual stream runs. If there is one by another "
            'name, say where: load(model, row=Row(blocks="path.of.the.list", ...)).'
        )
    return max(outermost, key=lambda path: (outermost[path], -len(path)))


@dataclass
class Seen:
    """Modules in the order in which they finished, with what came in and went out."""

    names: list[str] = field(default_factory=list)
    inputs: list[Tensor | None] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    logits: Tensor | None = None

    def of(self, name: str) -> int:
        """When a module last finished; -1 if it never ran."""
        return len(self.names) - 1 - self.names[::-1].index(name) if name in self.names else -1


@torch.no_grad()
def watch(model: nn.Module) -> Seen:
    """One pass over three tokens, every module's call written down."""
    seen, tokens = Seen(), torch.tensor(TOKENS, device=device_of(model))

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen.names.append(name)
            seen.inputs.append(args[0] if args and isinstance(args[0], Tensor) else None)
            seen.outputs.append(output)

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(note(name)).remove)
        seen.logits = logits_of(model(**{tokens_name(model): tokens}))
    return seen


def matched_rows(model: nn.Module) -> list[Row]:
    """Rows that may describe a model of an unknown class; the last knows its blocks only."""
    blocks = guess_blocks(model)
    seen = watch(model)
    tokens = torch.tensor(TOKENS)
    tables = [
        (name, seen.inputs[seen.of(name)])
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and seen.of(name) >= 0
    ]
    embed = [name for name, x in tables if x is not None and _same(x, tokens)]
    places = [name for name, x in tables if x is not None and _same(x, torch.arange(3))]
    n_vocab = seen.logits.shape[-1] if seen.logits is not None else 0
    last = len(list(hf.at(model, blocks))) - 1
    behind = seen.names[seen.of(f"{blocks}.{last}") + 1 :]
    heads = [n for n in behind if _rows(hf.at(model, n)) == n_vocab]
    norms = [
        n for n in behind if n not in heads and _is_norm(hf.at(model, n)) and f"{blocks}." not in n
    ]
    known = Row(
        base=_base(model, blocks),
        blocks=blocks,
        embed=embed[0] if embed else "",
        pos_embed=places[0] if places else None,
        unembed=heads[-1] if heads else "",
        ln_final=norms[-1] if norms else None,
        attn=None,
        mlp=None,
        ln1=None,
        ln2=None,
        **_norm_facts([hf.at(model, name) for name in norms]),
    )
    block = hf.at(model, blocks)[0]
    order = [n.removeprefix(f"{blocks}.0.") for n in seen.names if n.startswith(f"{blocks}.0.")]
    return [known.but(**parts) for parts in _block_parts(block, order)] + [known]


def runs(module: nn.Module) -> bool:
    """Whether a module can be called: containers of modules can't."""
    return type(module).forward is not nn.Module.forward


def _base(model: nn.Module, blocks: str) -> str:
    """The innermost module around the blocks that is called with tokens."""
    place = blocks
    while "." in place:
        place = place.rsplit(".", 1)[0]
        module = hf.at(model, place)
        if runs(module) and tokens_name(module) == "input_ids":
            return place
    return ""


def _same(x: Tensor, y: Tensor) -> bool:
    return not x.is_floating_point() and x.numel() == y.numel() and bool((x.cpu() == y).all())


def _rows(module: nn.Module) -> int:
    return hf.flat_weight(module).shape[0] if hf.is_plain_linear(module) else 0


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not list(module.children())


@torch.no_grad()
def _norm_facts(norms: list[nn.Module]) -> dict[str, Any]:
    """What kind of norms these are, by what they compute."""
    if not norms or isinstance(norms[0], nn.LayerNorm):
        return {}
    norm, weight = norms[0], getattr(norms[0], "weight", None)
    if weight is None:
        return {}
    bias = getattr(norm, "bias", None)
    x = 0.03 * torch.linspace(-1, 2, weight.numel(), device=weight.device)[None].float()
    theirs = norm(x.to(weight.dtype)).float()
    told = hf.find(norm, ("variance_epsilon", "eps", "epsilon", "norm_eps"))
    for eps, offset in product([told] if told else [1e-5, 1e-6, 1e-8, 1e-12], (0.0, 1.0)):
        w = weight.float() + offset
        rms = F.rms_norm(x, w.shape, w, eps)
        ln = F.layer_norm(x, w.shape, w, None if bias is None else bias.float(), eps)
        for kind, ours in (("RMS", rms), ("LN", ln)):
            if torch.allclose(ours, theirs, rtol=1e-5 if weight.dtype == torch.float32 else 1e-2):
                facts = {"norm": kind, "norm_offset": offset}
                return facts if told else facts | {"norm_eps": eps}
    return {}


# The block ----------------------------------------------------------------------------------------


def _block_parts(block: nn.Module, order: list[str]) -> Iterator[dict[str, Any]]:
    """What a row says of a block, every way that the order of its modules allows."""
    children = [name for name in dict.fromkeys(order) if "." not in name]
    norms = [name for name in children if _is_norm(getattr(block, name))]
    attn = next((n for n in children if MIXER.search(n) and n not in norms), None)
    mlp = next((n for n in children if MLP.search(n) and n not in norms), None)
    if attn is None or mlp is None:
        return
    at = {name: children.index(name) for name in children}
    before = [n for n in norms if at[n] < at[attn]]
    between = [n for n in norms if at[attn] < at[n] < at[mlp]]
    after = [n for n in norms if at[n] > at[mlp]]
    parts = {"attn": attn, "mlp": mlp} | _norm_facts([getattr(block, n) for n in norms])
    layouts = _layouts(before, between, after)
    ways = product(layouts, _attention_ways(block, attn, order), _mlp_ways(block, mlp, order))
    for layout, attention, dense in ways:
        yield {**parts, **layout, **attention, **dense}


def _layouts(before: list[str], between: list[str], after: list[str]) -> list[dict[str, Any]]:
    """Norms before, between and behind attention and MLP, as layouts that have them there."""
    match (before, between, after):
        case ([ln1], [ln2], []):
            return [{"ln1": ln1, "ln2": ln2}]
        case ([ln1], [], []):
            return [{"layout": "parallel", "ln1": ln1}]
        case ([ln1, ln2], [], []):
            return [{"layout": "parallel", "ln1": ln1, "ln2": ln2}]
        case ([], [first], [second]):
            post_norm = {"layout": "post_norm", "ln1": first, "ln2": second}
            return [post_norm, {"ln1_post": first, "ln2_post": second}]
        case ([ln1], [ln1_post, ln2], [ln2_post]):
            return [{"ln1": ln1, "ln1_post": ln1_post, "ln2": ln2, "ln2_post": ln2_post}]
    return []


def _attention_ways(block: nn.Module, attn: str, order: list[str]) -> list[dict[str, Any]]:
    """Projections in the order in which they run: q, k and v (or all in one), and out of it; the
    last way leaves attention whole."""
    linears = _linears(block, attn, order)
    none = ("q", "k", "v", "qkv", "d_head", "n_heads", "rotary", "scale")
    heads: dict[str, Any] = dict.fromkeys(none)
    for fact, names in (("n_heads", N_HEADS), ("d_head", D_HEAD)):
        places = [f"{attn}.{n}" for n in names] + list(names)
        heads[fact] = next((p for p in places if isinstance(hf.find(block, p), int)), None)
    heads["d_head"] = heads["d_head"] or ()
    match linears:
        case [qkv, out]:
            fused = heads | {"qkv": qkv, "o": out}
            ways = [fused | {"qkv_order": order} for order in ("blocks", "groups")]
        case [q, k, v, out]:
            ways = [heads | {"q": q, "k": k, "v": v, "o": out}]
        case _:
            ways = []
    uniform = [way | {"causal": causal} for way in ways for causal in (True, False)]
    return [*uniform, heads | {"o": None}]


def _mlp_ways(block: nn.Module, mlp: str, order: list[str]) -> list[dict[str, Any]]:
    """Linear maps in the order in which they run, and what has no weights: the activation; the last
    way leaves the MLP whole."""
    inside = [n for n in dict.fromkeys(order) if n.startswith(f"{mlp}.")]
    acts = [n for n in inside if _is_activation(hf.at(block, n))]
    parts: dict[str, Any] = {"gate": None, "act": acts[0] if acts else None}
    opaque, ways = parts | {"up": None, "down": None}, []
    match _linears(block, mlp, order):
        case [up, down]:
            ways = [{"up": up, "down": down}, {"up": None, "gate_up": up, "down": down}]
        case [first, second, down]:
            pairs = ((first, second), (second, first))
            ways = [{"gate": gate, "up": up, "down": down} for gate, up in pairs]
    return [*(parts | way for way in ways), opaque]


def _linears(block: nn.Module, part: str, order: list[str]) -> list[str]:
    inside = [n for n in dict.fromkeys(order) if n.startswith(f"{part}.")]
    return [n for n in inside if hf.is_plain_linear(hf.at(block, n))]


def _is_activation(module: nn.Module) -> bool:
    idle = (nn.Dropout, nn.Identity, nn.ModuleList, nn.Sequential)
    return not list(module.parameters()) and not isinstance(module, idle)
