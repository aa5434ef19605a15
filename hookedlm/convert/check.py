"""Check: Hugging Face's blocks and ours, side by side, on two small batches: padded, unpadded."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from hookedlm.convert import hf
from hookedlm.convert.calling import first_argument, logits_of, tokens_name
from hookedlm.convert.placed import brought, device_of
from hookedlm.convert.prepare import BlockCall, Call
from hookedlm.convert.report import Agreement, worse
from hookedlm.hooks import HookPoint, HookRequest, attached
from hookedlm.layers.context import Context
from hookedlm.layers.opaque import first

TOLERANCES = {
    torch.float64: 1e-5,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
}
"""Largest relative error of a block that still counts as the same, by the model's dtype."""

HALVES = (torch.float16, torch.bfloat16)

LENGTHS = (11, 7)
"""Real tokens in the two rows of the padded batch: the second row is padded on the left."""


@dataclass
class Truth:
    """What Hugging Face's model computed on the check's batch."""

    tokens: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    position_ids: Int[Tensor, "batch pos"]
    calls: list[Call] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    returned: int = 0
    """Length of the tuple a block returns; 0 when it returns the stream itself."""
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    skipped: list[int] = field(default_factory=list)
    """Blocks that a text alone does not pass through: a cross-attention to images, say."""
    order: list[int] = field(default_factory=list)
    """Which block each call was of."""
    hands_on: set[int] = field(default_factory=set)
    """Blocks that return tensors besides the stream."""

    def fill_in(self, ran: Sequence[int], n_layers: int) -> None:
        """A call for every skipped block, which hands on what it was given."""
        if list(ran) != sorted(set(ran)):
            return
        self.skipped = [layer for layer in range(n_layers) if layer not in ran]
        for layer in self.skipped:
            hidden = self.outputs[layer - 1] if layer else self.calls[0].hidden
            self.calls.insert(layer, Call(hidden, (), {}))
            self.outputs.insert(layer, hidden)
        self.order = list(range(n_layers))


def positions_of(mask: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Position ids that count only real tokens, as transformers' generation does."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def run_truth(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    d_vocab: int,
    padded: bool = True,
    first_position: int = 0,
    codebooks: int = 1,
) -> Truth:
    """One forward pass of Hugging Face's model, every block's call and output written down.

    With ``codebooks``, so many rows of tokens make one text. Without padding no mask is given, so
    that kernels which mask by themselves are seen at work.
    """
    device = device_of(model)
    generator = torch.Generator().manual_seed(0)
    n = max(LENGTHS)
    tokens = torch.randint(d_vocab, (len(LENGTHS) * codebooks, n), generator=generator)
    pad = hf.find(model, "config.pad_token_id")
    if isinstance(pad, int) and not 0 <= pad < d_vocab:
        pad = None  # of a vocabulary that this model does not have
    if isinstance(pad, int):  # some families count positions by tokens
        tokens[tokens == pad] = (pad + 1) % d_vocab
    lengths = LENGTHS if padded else (n,) * len(LENGTHS)
    mask = torch.stack([torch.arange(n) >= n - length for length in lengths]).long()
    if isinstance(pad, int):
        tokens[mask.repeat_interleave(codebooks, dim=0) == 0] = pad
    truth = Truth(tokens.to(device), mask.bool().to(device), positions_of(mask).to(device))

    layer_of, ran = {id(block): layer for layer, block in enumerate(blocks)}, list[int]()
    truth.order = ran

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ran.append(layer_of[id(module)])
        name = first_argument(module)
        hidden, *rest = args if args else (kwargs[name],)
        kwargs = {n: value for n, value in kwargs.items() if n != name}
        device = device_of(module) if list(module.parameters()) else hidden.device
        if device != hidden.device:  # accelerate moves it later, inside of forward
            hidden, rest, kwargs = (brought(x, device) for x in (hidden, rest, kwargs))
        truth.calls.append(Call(hidden, tuple(rest), kwargs))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        truth.returned = len(output) if isinstance(output, (tuple, list)) else 0
        truth.outputs.append(first(output))
        if truth.returned and any(isinstance(x, Tensor) for x in output[1:]):
            truth.hands_on.add(layer_of[id(module)])

    accepts = inspect.signature(model.forward).parameters
    kwargs: dict[str, Any] = {tokens_name(model): truth.tokens}
    if padded:
        ids = truth.position_ids + first_position
        kwargs |= {"attention_mask": mask.to(device), "position_ids": ids}
    kwargs = {name: value for name, value in kwargs.items() if name in accepts}
    if "use_cache" in accepts:
        kwargs["use_cache"] = False
    with ExitStack() as stack:
        for block in blocks:
            handles = (
                block.register_forward_pre_hook(before, with_kwargs=True),
                block.register_forward_hook(after),
            )
            for handle in handles:
                stack.callback(handle.remove)
        truth.logits = logits_of(model(**kwargs))
    truth.fill_in(ran, len(blocks))
    return truth


def compare(ours: Tensor, theirs: Tensor, real: Bool[Tensor, "batch pos"]) -> Agreement:
    """Relative error over the real positions (over all of a stream that has other axes than
    tokens have); not a number counts as infinitely wrong."""
    if ours.ndim == 3 and theirs.ndim == 3 and 0 < theirs.shape[1] < ours.shape[1]:
        last = theirs.shape[1]  # some classes read out the last position only
        ours, real = ours[:, -last:], real[:, -last:]
    if ours.shape != theirs.shape:
        return Agreement(float("inf"), False, float("inf"))
    ours, real = ours.to(theirs.device), real.to(theirs.device)
    fits = real.shape == ours.shape[:-1]
    a, b = (x[real].double() if fits else x.double() for x in (ours, theirs))
    errors = (a - b).abs().amax(-1) / b.abs().max().clamp(min=1e-30)
    error, typical = float(errors.max()), float(errors.median())
    if error != error:
        return Agreement(float("inf"), False, float("inf"))
    return Agreement(error, bool(torch.equal(a, b)), typical)


def listen_to_all(module: nn.Module) -> list[HookRequest]:
    """Observers on every hook point of a module, so that its longhand code runs."""

    def look(x: Tensor, hook: HookPoint) -> None:
        """See and leave alone."""

    points = [point for point in module.modules() if isinstance(point, HookPoint)]
    return [HookRequest(point, look, observes=True) for point in points]


@torch.no_grad()
def check_block(
    block: nn.Module, call: BlockCall, truths: Sequence[Truth], layer: int
) -> tuple[Agreement, Agreement]:
    """(quiet, listening): the block run on Hugging Face's inputs, both ways; the worst of each."""
    quiet = listening = Agreement(0.0, True)
    for truth in truths:
        out, longhand = outputs_of(block, call, truth, layer)
        quiet = worse(quiet, compare(out, truth.outputs[layer], truth.real))
        listening = worse(listening, compare(longhand, truth.outputs[layer], truth.real))
    return quiet, listening


def outputs_of(
    block: nn.Module, call: BlockCall, truth: Truth, layer: int
) -> tuple[Tensor, Tensor]:
    """What a block answers to Hugging Face's inputs: nobody listening, everybody listening."""
    hidden, context = truth.calls[layer].hidden, call.context(truth.calls[layer], past=0)
    quiet = block(hidden, context)
    with attached(listen_to_all(block)):
        return quiet, block(hidden, context)


def precision_of(modules: Sequence[nn.Module], stream: Tensor) -> torch.dtype:
    """What results are exact to: the coarsest dtype among the weights and the stream. Some families
    keep single weights, or the stream, in float32."""
    dtypes = {stream.dtype, *(p.dtype for module in modules for p in module.parameters())}
    return max(dtypes & TOLERANCES.keys(), key=lambda dtype: torch.finfo(dtype).eps)


def not_prepared(theirs: Context, ours: Context) -> list[str]:
    """What Hugging Face calls a block with that preparing did not bring about, by name.

    That is what blocks hand each other besides the stream: no recorder in a block's place makes it.
    """
    names = [
        name
        for name in ("mask", "bias", "rotary", "layer_input")
        if not _same(vars(theirs)[name], vars(ours)[name])
    ]
    given = theirs.kwargs.items()
    return names + [name for name, value in given if not _same(value, ours.kwargs.get(name))]


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments hold the same tensors; what holds none is let pass."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b.to(a.device))
    if isinstance(a, (tuple, list)):
        items = b if isinstance(b, (tuple, list)) else ()
        return all(_same(x, y) for x, y in zip_longest(a, items))
    if isinstance(a, dict):
        entries = b if isinstance(b, dict) else {}
        return all(_same(x, entries.get(key)) for key, x in a.items())
    return True


def within(agreement: Agreement, dtype: torch.dtype, reroutes: bool = False) -> bool:
    """Whether an agreement is as good as this dtype allows.

    ``reroutes``: a mixture of experts listened to in half precision. There rounding decides near
    ties of the router, so that single positions go to another expert: the median position judges.
    """
    error = agreement.error
    if reroutes and dtype in HALVES:
        error = agreement.typical
    return error <= TOLERANCES.get(dtype, 1e-5)
