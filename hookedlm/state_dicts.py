"""State dicts as models: a twin of the model's structure that holds the dictionary's tensors.

Whatever changes a model's weights thereby changes a state dict too, and is written once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hookedlm.errors import InputError
from hookedlm.layers.norm import Norm
from hookedlm.layers.weights import Weights
from hookedlm.names import nearest
from hookedlm.placing import canonical_names

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer

StateDict = Mapping[str, Tensor]
STREAM_NORMS = ("ln1", "ln2", "ln_final")


# Names --------------------------------------------------------------------------------------------


def norm_names(model: HookedTransformer) -> dict[str, Norm]:
    """Name of every weight and bias that a norm of the stream has, or had before it was folded."""
    return {
        f"{where}.{leaf}": norm
        for where, norm in model.named_modules()
        if isinstance(norm, Norm) and where.rpartition(".")[2] in STREAM_NORMS
        for leaf in (("w", "b") if norm.spec.centres else ("w",))
    }


def checked(model: HookedTransformer, state_dict: StateDict) -> dict[str, Tensor]:
    """The dictionary's tensors by this library's names.

    Raises InputError for a name this model has no weight for, naming the nearest, and for a tensor
    of another shape.
    """
    shapes = {name: x.shape for name, x in model.state_dict().items() if isinstance(x, Tensor)}
    norms = norm_names(model)
    given = canonical_names(state_dict)
    for name, x in given.items():
        expected = torch.Size((model.cfg.d_model,)) if name in norms else shapes.get(name)
        if expected is None:
            close = nearest(name, [*shapes, *norms])
            hint = f" Nearest: {', '.join(close)}." if close else ""
            raise InputError(f"this model has no weight {name!r}.{hint}")
        if x.shape != expected:
            raise InputError(f"{name} is {tuple(x.shape)}, this model's {tuple(expected)}")
    return given


def missing(model: HookedTransformer, given: StateDict) -> dict[str, Tensor]:
    """The model's own tensors where the dictionary has none.

    Biases that the family lacks are not missing, nor are norms when the dictionary has none of
    them: it holds weights into which they were folded.
    """
    norms = norm_names(model)
    folded = not any(name in given for name in norms)
    live = set(dict(model.named_parameters(remove_duplicate=False)))
    live |= set(dict(model.named_buffers(remove_duplicate=False)))
    return {
        name: x
        for name, x in model.state_dict().items()
        if name in live and name not in given and not (folded and name in norms)
    }


def some(names: Iterable[str], n: int = 4) -> str:
    """The first few names, and how many more there are."""
    found = list(names)
    more = f" and {len(found) - n} more" if len(found) > n else ""
    return ", ".join(found[:n]) + more


# Twins --------------------------------------------------------------------------------------------


def twin_of(model: HookedTransformer) -> HookedTransformer:
    """A copy of the structure, without hooks or history, on the same tensors."""
    memo: dict[int, object] = {id(model.tokenizer): model.tokenizer, id(model.history): []}
    for root in (model, *model._outside_modules()):
        memo |= {id(x): x for x in (*root.parameters(), *root.buffers())}
    for point in model.hook_dict.values():
        memo |= {id(point.fwd_hooks): [], id(point.bwd_hooks): [], id(point.ctx): {}}
    twin = copy.deepcopy(model, memo)
    for point in twin.hook_dict.values():
        point.wanted = False
    return twin


def twin_with(model: HookedTransformer, given: StateDict) -> HookedTransformer:
    """A twin that holds these tensors, in the widest of their dtypes. Norms of the stream that the
    dictionary lacks are folded ones; all else it lacks is the model's."""
    twin = twin_of(model)
    floats = [x.dtype for x in given.values() if x.is_floating_point()]
    dtype = reduce(torch.promote_types, floats, floats[0] if floats else model.dtype)
    trains = next(model.parameters()).requires_grad
    for name, norm in norm_names(twin).items():
        if name not in given:
            norm._parameters[name.rpartition(".")[2]] = None
    for name, x in given.items():
        where, _, leaf = name.rpartition(".")
        module = twin.get_submodule(where)
        x = x.detach().to(model.device, dtype if x.is_floating_point() else None)
        if leaf in module._buffers:
            module._buffers[leaf] = x
            continue
        old = module._parameters[leaf]
        if old is None and isinstance(module, Weights) and leaf in module._zeros and not x.any():
            continue  # absent here, zeros there
        learns = trains if old is None else old.requires_grad
        module._parameters[leaf] = nn.Parameter(x, requires_grad=learns)
    kind = (twin.cfg.normalization_type or "").removesuffix("Pre")
    if kind:
        weighted = any(name in given for name in norm_names(twin))
        twin.cfg.normalization_type = kind if weighted else f"{kind}Pre"
    return twin


def changed(
    model: HookedTransformer,
    state_dict: StateDict,
    change: Callable[[HookedTransformer], None],
) -> dict[str, Tensor]:
    """What ``change`` makes of a state dict, in a dictionary of its own; names, dtypes and devices
    are those given. Raises InputError for names that are unknown or missing."""
    given = checked(model, state_dict)
    if absent := missing(model, given):
        raise InputError(
            f"the state dict lacks {some(absent)}: model.fill_missing_keys(state_dict) takes them "
            "from the model"
        )
    twin = twin_with(model, given)
    before = dict(twin.named_parameters(remove_duplicate=False))
    change(twin)
    after = dict(twin.named_parameters(remove_duplicate=False))
    result: dict[str, Tensor] = {}
    for name, x in state_dict.items():
        own = next(iter(canonical_names({name: x})), name)
        if own in after and after[own] is not before.get(own):
            result[name] = after[own].detach().to(x.device, x.dtype)
        elif own in after or own not in before:
            result[name] = x
    dtype, device = next((x.dtype, x.device) for x in given.values() if x.is_floating_point())
    for own, x in after.items():
        if own not in given and own not in before:  # a bias that came into being
            result[own] = x.detach().to(device, dtype)
    return result


@torch.no_grad()
def adopt(model: HookedTransformer, twin: HookedTransformer) -> None:
    """Give a model the weights of its twin, in its own dtype and place.

    In place in a model built from a config, so that an optimizer goes on with it; in a converted
    one, whose memory may be Hugging Face's too, as new parameters.
    """
    in_place = model.conversion is None
    for name, module in list(model.named_modules()):
        other = twin.get_submodule(name)
        for leaf, buffer in other._buffers.items():
            if buffer is not module._buffers[leaf]:
                module._buffers[leaf] = buffer.to(module._buffers[leaf], copy=True)
        for leaf, new in other._parameters.items():
            old = module._parameters[leaf]
            if new is None:
                module._parameters[leaf] = None
            elif old is None:
                copied = new.detach().to(model.device, model.dtype, copy=True)
                module._parameters[leaf] = nn.Parameter(copied, requires_grad=new.requires_grad)
            elif new is not old and not in_place:
                copied = torch.empty_like(old).copy_(new)  # laid out as before
                module._parameters[leaf] = nn.Parameter(copied, requires_grad=old.requires_grad)
    if in_place:
        model.load_state_dict(twin.state_dict())
