"""Pairs of runs between which parts are swapped, at positions that may differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from hookedlm.errors import InputError
from hookedlm.patching.choices import Axis, chosen, is_all
from hookedlm.patching.ends import Prompt, Prompts

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer

Masks: TypeAlias = (
    Int[Tensor, "batch pos"] | tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]] | None
)
"""Of tokens that are padded: one for both runs, or (base, source)."""
Places: TypeAlias = Int[Tensor, "n batch"]


@dataclass(frozen=True, eq=False)
class Pair:
    """Two batches of prompts, of which the rows belong together; the lengths may differ."""

    base: Prompt
    source: Prompt

    def __len__(self) -> int:
        return len(self.base.tokens)

    def rows(self, index: Int[Tensor, "rows"]) -> Pair:
        """Some of them."""
        return Pair(_rows(self.base, index), _rows(self.source, index))


def _rows(prompt: Prompt, index: Tensor) -> Prompt:
    index = index.to(prompt.tokens.device)
    return Prompt(prompt.tokens[index], None if prompt.mask is None else prompt.mask[index])


def read_pair(
    model: HookedTransformer,
    base: Prompts,
    source: Prompts,
    attention_mask: Masks = None,
    prepend_bos: bool | None = None,
) -> Pair:
    """Both, tokenized; one prompt serves several of the other. Raises InputError on other
    numbers."""
    masks = attention_mask if isinstance(attention_mask, tuple) else (attention_mask,) * 2
    here = _prompt(model, "base", base, masks[0], prepend_bos)
    there = _prompt(model, "source", source, masks[1], prepend_bos)
    n = max(len(here.tokens), len(there.tokens))
    for what, prompt in (("base", here), ("source", there)):
        if len(prompt.tokens) not in (1, n):
            raise InputError(f"{what} has {len(prompt.tokens)} prompts for {n} of the other run")
    return Pair(here.rows(n), there.rows(n))


def _prompt(
    model: HookedTransformer, what: str, given: Any, mask: Tensor | None, bos: bool | None
) -> Prompt:
    if isinstance(given, Tensor) and given.is_floating_point():
        raise InputError(f"{what} is a float tensor: expected text, texts or tokens [batch, pos]")
    tokens, known, _ = model._read_input(given, bos, None, None, None, mask)
    assert tokens is not None
    return Prompt(tokens, known)


def last_positions(prompt: Prompt) -> Int[Tensor, "batch"]:
    """Each row's last column that is not padding."""
    n, length = prompt.tokens.shape
    if prompt.mask is None:
        return torch.full((n,), length - 1)
    columns = torch.arange(length, device=prompt.mask.device)
    return (columns * (prompt.mask > 0)).amax(1).cpu()


# Positions ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Positions:
    """Of each swap: its label, and where it is in every example of the base and of the source."""

    labels: tuple[int | str, ...]
    base: Places
    source: Places

    @property
    def differ(self) -> bool:
        """Whether any stands elsewhere in the source."""
        return not torch.equal(self.base, self.source)

    def named(self) -> dict[str, Int[Tensor, "batch"]]:
        """Those of the base, as a grid takes them."""
        return {str(label): row for label, row in zip(self.labels, self.base, strict=True)}


def positions_of(pair: Pair, choice: Any) -> Positions | None:
    """What ``positions=`` means; None: all at once.

    "all" | "last" | int | several | for each example ``[batch]`` or ``[batch, n]`` | several by
    name; or a tuple of two of these, base and source. Raises InputError on positions that are not
    there or are padding, and where base and source need positions of their own.
    """
    if isinstance(choice, tuple) and len(choice) != 2:
        raise InputError(
            f"positions={choice!r}: a tuple is (those of the base, those of the source); several "
            "positions are a list"
        )
    here, there = choice if isinstance(choice, tuple) else (choice, choice)
    if here is None or there is None or is_all(here):
        _check_alike(pair, choice)
    if here is None and there is None:
        return None
    if here is None or there is None:
        raise InputError("positions: None (all at once) is for base and source alike")
    ours, theirs = _places("base", pair.base, here), _places("source", pair.source, there)
    n, m = len(ours), len(theirs)
    if m not in (1, n):
        raise InputError(f"{n} positions in the base and {m} in the source: they must pair up")
    both = (_spread(axis, len(pair)) for axis in (ours, theirs))
    base, source = torch.broadcast_tensors(*both)
    return Positions(ours.labels, base, source)


def read_position(prompt: Prompt, choice: Any) -> Int[Tensor, "batch"]:
    """Where logits are read in each example: "last", one column for all, or one for each. Raises
    InputError on anything else."""
    given = torch.as_tensor(choice) if isinstance(choice, list) else choice
    found = positions_of(Pair(prompt, prompt), given)
    if found is None or len(found.base) != 1:
        raise InputError(f"read_at={choice!r}: expected one position, or one for each example")
    return found.base[0]


def _spread(axis: Axis, n_examples: int) -> Places:
    places = axis.places
    return places if places.ndim == 2 else places[:, None].expand(-1, n_examples)


def _places(what: str, prompt: Prompt, choice: Any) -> Axis:
    n, length = prompt.tokens.shape
    if isinstance(choice, str) and choice == "last":
        choice = {"last": last_positions(prompt)}
    axis = chosen("pos", choice, length, n)
    if prompt.mask is None or is_all(choice):
        return axis
    places = _spread(axis, n)
    real = prompt.mask.cpu().gather(1, places.t()) > 0
    if not bool(real.all()):
        example, i = (~real).nonzero()[0].tolist()
        raise InputError(
            f"position {int(places[i, example])} is padding in example {example} of the {what}: "
            'give positions for each example [batch] or [batch, n], or "last"'
        )
    return axis


def _check_alike(pair: Pair, choice: Any) -> None:
    """Raise InputError unless every position has its partner in the source."""
    base, source = pair.base, pair.source
    masks = [torch.ones_like(p.tokens) if p.mask is None else p.mask for p in (base, source)]
    if base.tokens.shape == source.tokens.shape and torch.equal(*masks):
        return
    if isinstance(choice, tuple) and choice[1] is not None and not is_all(choice[1]):
        return
    raise InputError(
        f"base and source differ in length ({base.tokens.shape[1]} and {source.tokens.shape[1]} "
        "columns, or in padding): give positions as a tuple, (those of the base, those of the "
        'source), or positions="last"'
    )


# Tokens -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Answers:
    """Tokens of which logits are read. ``names``: what they stand for, if they were named."""

    ids: Int[Tensor, "batch n"]
    names: tuple[str, ...] | None

    def rows(self, index: Tensor) -> Answers:
        """Of some examples."""
        return Answers(self.ids[index], self.names)


def answers_of(model: HookedTransformer, tokens: Any, n_examples: int) -> Answers:
    """What ``tokens=`` means: a token (text or id) or several; or by name, for each example its
    own; or ids ``[batch, n]``. Raises InputError on anything else."""
    names: tuple[str, ...] | None = None
    if isinstance(tokens, Mapping):
        if not tokens:
            raise InputError("tokens={}: name at least one token")
        names = tuple(map(str, tokens))
        columns = [token_ids(model, each) for each in tokens.values()]
        for name, ids in zip(names, columns, strict=True):
            if len(ids) not in (1, n_examples):
                raise InputError(f"tokens[{name!r}]: {len(ids)} for {n_examples} examples")
        found = torch.stack([ids.expand(n_examples) for ids in columns], dim=1)
    elif isinstance(tokens, Tensor) and tokens.ndim == 2:
        if len(tokens) not in (1, n_examples):
            raise InputError(f"tokens [{len(tokens)}, n] for {n_examples} examples")
        found = torch.stack([token_ids(model, row) for row in tokens])
        names = tuple(map(str, range(found.shape[1]))) if len(tokens) > 1 else None
        found = found.expand(n_examples, -1)
    else:
        found = token_ids(model, tokens).expand(n_examples, -1)
    return Answers(found, names)


def token_ids(model: HookedTransformer, tokens: Any) -> Int[Tensor, "n"]:
    """The ids of a token (text or id) or several. Raises InputError on ids that are not there,
    NotOneTokenError on a text that is several."""
    listed = tokens.reshape(-1).tolist() if isinstance(tokens, Tensor) else tokens
    listed = listed if isinstance(listed, (list, tuple)) else [listed]
    ids = [model.to_single_token(each) if isinstance(each, str) else each for each in listed]
    if not ids or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise InputError(f"tokens={tokens!r}: expected a token's text or id, or several")
    if bad := [i for i in ids if not 0 <= i < model.cfg.d_vocab]:
        raise InputError(f"token {bad[0]}: the vocabulary has 0 to {model.cfg.d_vocab - 1}")
    return torch.tensor(ids)
