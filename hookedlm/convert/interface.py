"""Heads of opaque attention, through transformers' public `AttentionInterface`.

Most attention in transformers leaves queries, keys and values to a kernel that its config names.
One name of ours is registered there once; in our copy of a model, the config of each attention that
runs as Hugging Face wrote it says that name. While nobody listens our kernel hands on to the one
that was named before; while somebody does, it computes longhand, with hook points on everything.

What a kernel of ours can't know (a selection of keys, say, that a family's own kernel makes) is
found by comparing: such attention shows no points.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hookedlm.convert import hf
from hookedlm.convert.check import Truth, compare, listen_to_all, within
from hookedlm.convert.prepare import BlockCall
from hookedlm.convert.report import Agreement, PartReport, worse
from hookedlm.hooks import attached
from hookedlm.layers.context import Context
from hookedlm.layers.opaque import OpaqueAttention, OpaqueBlock, SharedHeads, first

NAME = "hookedlm"
"""What our kernel is called in transformers' tables, and where a module of ours keeps its part."""


def kernel(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers asks for it, done by what this module was given."""
    return vars(module)[NAME](module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, kernel)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


class HandsOn:
    """The kernel that was named before, and what was noticed on the way to it."""

    def __init__(self, original: str, order: list[nn.Module]):
        self.original = original
        self.order = order
        self.keys: list[Tensor] = []

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        self.order.append(module)
        self.keys.append(k)
        return original(self.original, module)(module, q, k, v, mask, **kwargs)


def original(name: str, module: nn.Module) -> Any:
    """The kernel of this name, as the file that the module comes from would find it."""
    file = vars(sys.modules[type(module).__module__])
    table = file.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    return table.get_interface(name, file.get("eager_attention_forward"))


class Listening:
    """The kernel that was named before, or longhand while somebody listens."""

    def __init__(self, original: str, calls: list[SharedHeads]):
        self.original = original
        self.calls = calls
        self.made = 0
        self.pairs: list[tuple[Tensor, Tensor]] | None = None
        """While being compared: what longhand and the kernel gave."""

    def start(self, module: nn.Module, args: Any) -> None:
        """The module runs anew: its first call is next."""
        self.made = 0

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        heads = self.calls[self.made % len(self.calls)]
        self.made += 1
        if not heads.wanted:
            return original(self.original, module)(module, q, k, v, mask, **kwargs)
        scale, causal = kwargs.get("scaling"), kwargs.get("is_causal")
        sinks = kwargs.get("s_aux")
        z, pattern = heads(
            q,
            k,
            v,
            mask,
            scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
            bias=kwargs.get("position_bias"),
            softcap=kwargs.get("softcap"),
            sinks=hf.find(module, "sinks") if sinks is None else sinks,
            causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
        )
        if self.pairs is not None:
            expected, _ = original(self.original, module)(module, q, k, v, mask, **kwargs)
            self.pairs.append((z, expected))
        return z.contiguous(), pattern


# Showing ------------------------------------------------------------------------------------------


@torch.no_grad()
def show_heads(
    report: PartReport, block: nn.Module, call: BlockCall, truths: Sequence[Truth], layer: int
) -> PartReport:
    """Give the opaque attention of a block its hook points, where longhand computes the same.

    The report comes back with what that comparison found, or with what stands against it.
    """
    for part in [m for m in block.modules() if isinstance(m, (OpaqueAttention, OpaqueBlock))]:
        try:
            found = _shown(part, block, call, truths, layer)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            found = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if isinstance(found, str):
            hidden = f"its heads are not shown: {found}"
            report = replace(report, reason="; ".join(filter(None, [report.reason, hidden])))
        elif found is not None and report.listening is not None:
            report = replace(report, listening=worse(report.listening, found))
    return report


def _shown(
    part: OpaqueAttention | OpaqueBlock,
    block: nn.Module,
    call: BlockCall,
    truths: Sequence[Truth],
    layer: int,
) -> Agreement | str | None:
    """How well longhand agrees, or why it is not used; None where no interface is called."""
    callers, rotated = _callers(part.module, block, call, truths, layer)
    if not callers:
        return None
    theirs = [_outputs(callers, block, call, truth, layer) for truth in truths]
    with _ours(callers) as names:
        kernels = {m: Listening(names[m], []) for m in dict.fromkeys(callers)}
        heads = [SharedHeads(rotated) for _ in callers]
        for module, points in zip(callers, heads, strict=True):
            kernels[module].calls.append(points)
        for module, ours in kernels.items():
            vars(module)[NAME] = ours
        same = Agreement(0.0, True)
        for truth, expected in zip(truths, theirs, strict=True):
            ours_now = _outputs(callers, block, call, truth, layer)
            for x, y in zip(ours_now, expected, strict=True):
                same = worse(same, compare(x, y, truth.real))
        compared = _compared(list(kernels.values()), block, call, truths, layer)
    if compared is None:
        return "the interface is not called every time"
    agreement, dtype = compared
    if not within(same, dtype):
        return "what it hands to its kernel depends on the kernel's name"
    if not within(agreement, dtype):
        return f"longhand is {agreement.error:.1e} away"
    for module, ours in kernels.items():
        _name_ours(module)
        vars(module)[NAME] = ours
        module.register_forward_pre_hook(ours.start)
    part.show(heads)
    return agreement


def _callers(
    module: nn.Module, block: nn.Module, call: BlockCall, truths: Sequence[Truth], layer: int
) -> tuple[list[nn.Module], bool]:
    """(the modules that call the interface, in order and as often; whether positions turn keys)."""
    candidates = [
        m for m in module.modules() if isinstance(hf.find(m, "config._attn_implementation"), str)
    ]
    truth, order = truths[-1], list[nn.Module]()
    with _ours(candidates) as names:
        probes = {m: HandsOn(names[m], order) for m in candidates}
        for m, probe in probes.items():
            vars(m)[NAME] = probe
        context = call.context(truth.calls[layer], past=0)
        block(truth.calls[layer].hidden, context)
        callers, before = list(order), [probe.keys[:] for probe in probes.values()]
        for probe in probes.values():
            probe.keys.clear()
        if callers:
            with suppress(IndexError, RuntimeError):  # some can't run at these positions
                block(truth.calls[layer].hidden, _elsewhere(context))
    pairs = [
        (a, b)
        for probe, keys in zip(probes.values(), before, strict=True)
        for a, b in zip(probe.keys, keys, strict=False)
    ]
    return callers, any(not torch.equal(a, b) for a, b in pairs)


def _elsewhere(context: Context) -> Context:
    """The same block called for other positions: half a turn, and three further on."""
    kwargs = dict(context.kwargs)
    for name, change in (("position_embeddings", -1), ("position_ids", 3)):
        kwargs[name] = _changed(kwargs[name], change) if name in kwargs else None
    given = {name: value for name, value in kwargs.items() if name in context.kwargs}
    return replace(context, kwargs=given)


def _changed(value: Any, change: int) -> Any:
    if isinstance(value, Tensor):
        return value * change if value.is_floating_point() or value.is_complex() else value + change
    return type(value)(_changed(x, change) for x in value) if isinstance(value, tuple) else value


def _outputs(
    callers: Sequence[nn.Module], block: nn.Module, call: BlockCall, truth: Truth, layer: int
) -> list[Tensor]:
    """What the modules that call the interface return when the block runs."""
    found: list[Tensor] = []
    with ExitStack() as stack:
        for module in dict.fromkeys(callers):
            handle = module.register_forward_hook(lambda m, args, out: found.append(first(out)))
            stack.callback(handle.remove)
        block(truth.calls[layer].hidden, call.context(truth.calls[layer], past=0))
    return found


def _compared(
    kernels: Sequence[Listening],
    block: nn.Module,
    call: BlockCall,
    truths: Sequence[Truth],
    layer: int,
) -> tuple[Agreement, torch.dtype] | None:
    """How well longhand agrees with the kernels, and in which dtype; None where a point did not
    fire."""
    agreement, dtype = Agreement(0.0, True), truths[0].calls[layer].hidden.dtype
    points = [
        request for ours in kernels for heads in ours.calls for request in listen_to_all(heads)
    ]
    for truth in truths:
        for ours in kernels:
            ours.made = 0
        # Some attention does other things for a kernel whose name it does not know.
        out = block(truth.calls[layer].hidden, call.context(truth.calls[layer], past=0))
        agreement = worse(agreement, compare(out, truth.outputs[layer], truth.real))
        for ours in kernels:
            ours.pairs, ours.made = [], 0
        with attached(points) as hooks:
            block(truth.calls[layer].hidden, call.context(truth.calls[layer], past=0))
        if any(hook.fired != 1 for hook in hooks):
            return None
        for ours in kernels:
            for z, expected in ours.pairs or ():
                agreement = worse(agreement, compare(z.flatten(2), expected.flatten(2), truth.real))
                dtype = expected.dtype  # the stream's may be another
            ours.pairs = None
    return agreement, dtype


@contextmanager
def _ours(modules: Sequence[Any]) -> Iterator[dict[nn.Module, str]]:
    """For a while these modules name our kernel. Given: what each names otherwise."""
    configs = {m: m.config for m in modules}
    try:
        for m in configs:
            _name_ours(m)
        yield {m: config._attn_implementation for m, config in configs.items()}
    finally:
        for m, config in configs.items():
            m.config = config
            vars(m).pop(NAME, None)


def _name_ours(module: Any) -> None:
    """Give a module a config of its own that names our kernel: others keep theirs."""
    module.config = copy.deepcopy(module.config)
    module.config._attn_implementation = NAME
