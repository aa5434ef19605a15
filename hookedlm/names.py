"""Names of activations: the shorthand notebooks use, and the nearest name to a misspelt one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher

from hookedlm.errors import HookNameError

NAME_ALIASES = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "key": "k",
    "query": "q",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_mid": "mid",
    "mlp_post": "post",
}
PART_ALIASES = {"a": "attn", "attention": "attn", "m": "mlp", "b": "", "block": "", "blocks": ""}

HOME = {
    **dict.fromkeys("k v q z rot_k rot_q result pattern attn_scores".split(), "attn"),
    **dict.fromkeys("pre post mid pre_linear".split(), "mlp"),
    **dict.fromkeys("router_logits expert_weights expert_out".split(), "mlp"),
}
"""The part of a block in which an activation always lives, whatever ``layer_type`` says."""

COMPACT = re.compile(r"([a-z]+)(\d+)([a-z]?.*)")
IN_BLOCK = re.compile(r"blocks\.(-?\d+)\.(.+)")
TRAILING_LAYER = re.compile(r"(.*[a-z_])(\d+)")
GOOD_ENOUGH = 0.6


def get_act_name(name: str, layer: int | str | None = None, layer_type: str | None = None) -> str:
    """The full hook name of an activation given in shorthand.

    | call | result |
    | --- | --- |
    | ``get_act_name("embed")`` | ``hook_embed`` |
    | ``get_act_name("resid_pre", 0)`` | ``blocks.0.hook_resid_pre`` |
    | ``get_act_name("k", 6, "a")``, ``get_act_name("k6")`` | ``blocks.6.attn.hook_k`` |
    | ``get_act_name("attn", 3)``, ``get_act_name("pattern", 3)`` | ``blocks.3.attn.hook_pattern`` |
    | ``get_act_name("attn_out", 3)`` | ``blocks.3.hook_attn_out`` |
    | ``get_act_name("result", 2)`` | ``blocks.2.attn.hook_result`` |
    | ``get_act_name("pre", 2)``, ``get_act_name("pre2")`` | ``blocks.2.mlp.hook_pre`` |
    | ``get_act_name("mlp_out", 1)`` | ``blocks.1.hook_mlp_out`` |
    | ``get_act_name("normalized", 27, "ln2")`` | ``blocks.27.ln2.hook_normalized`` |
    | ``get_act_name("scale4ln1")`` | ``blocks.4.ln1.hook_scale`` |
    | ``get_act_name("scale")`` | ``ln_final.hook_scale`` |
    | ``get_act_name("blocks.1.hook_q_input")`` | unchanged, like every full name |

    The compact form ``<letters><layer>[<layer_type>]`` has no underscores: write
    ``("resid_post", 4)``, not ``"resid_post4"``. Nothing here knows a model, so names are not
    checked and a negative layer is not resolved; `ActivationCache` and the hook functions do that.

    Raises HookNameError when the compact form and ``layer`` name different layers.
    """
    if layer is None and layer_type is None and ("." in name or name.startswith("hook_")):
        return name
    if compact := COMPACT.match(name):
        name, digits, part = compact.groups()
        if layer is not None and int(layer) != int(digits):
            raise HookNameError(
                f"'{compact.string}' names layer {digits} and the layer given beside it is {layer}"
            )
        layer, layer_type = digits, part or layer_type

    name = NAME_ALIASES.get(name, name).removeprefix("hook_")
    part = PART_ALIASES.get(layer_type or "", layer_type or "")
    part = HOME.get(name, part)
    if name in ("scale", "normalized") and layer is None:
        part = part or "ln_final"
    place = [] if layer is None else [f"blocks.{layer}"]
    return ".".join([*place, *([part] if part else []), f"hook_{name}"])


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """The names most like ``name``, best first; at most ``n``, none when nothing is similar.

    A layer's activation is offered once, at the layer asked for or the closest there is.
    """
    layer, wanted = split_layer(name.strip().lower())
    if layer is None and (numbered := TRAILING_LAYER.fullmatch(wanted)):
        wanted, layer = numbered[1], int(numbered[2])

    places: dict[str, dict[int | None, str]] = {}
    for candidate in candidates:
        at, rest = split_layer(candidate)
        places.setdefault(rest, {})[at] = candidate

    scores = {rest: likeness(wanted, rest.lower()) for rest in places}
    best = sorted(
        (rest for rest in places if scores[rest] >= GOOD_ENOUGH), key=lambda r: -scores[r]
    )
    return [at_layer(places[rest], layer) for rest in best[:n]]


def split_layer(name: str) -> tuple[int | None, str]:
    """``blocks.3.attn.hook_q`` -> (3, ``attn.hook_q``); other names -> (None, name)."""
    inside = IN_BLOCK.fullmatch(name)
    return (int(inside[1]), inside[2]) if inside else (None, name)


def at_layer(places: dict[int | None, str], layer: int | None) -> str:
    """The name at ``layer`` or the closest layer; the first one when no layer was asked for."""
    layers = [at for at in places if at is not None]
    if not layers or layer is None:
        return next(iter(places.values()))
    if layer < 0:
        layer += max(layers) + 1
    return places[min(layers, key=lambda at: abs(at - layer))]


def likeness(wanted: str, name: str) -> float:
    """How well ``name`` answers ``wanted``: above 1 when it ends in it, else 0 to 1."""
    whole = ratio(wanted, name)
    if f".{name}".endswith(f".{wanted}"):
        return 2 + whole
    last, last_wanted = bare(name), bare(wanted)
    if last_wanted in (last, *(short for short, full in NAME_ALIASES.items() if full == last)):
        return 1 + whole
    return 0.7 * ratio(last_wanted, last) + 0.3 * whole


def bare(name: str) -> str:
    """What is left of a hook name without its place: ``attn.hook_q`` -> ``q``."""
    return name.rpartition(".")[2].removeprefix("hook_")


def ratio(left: str, right: str) -> float:
    """Similarity of two strings, 0 to 1."""
    return SequenceMatcher(None, left, right, autojunk=False).ratio()
