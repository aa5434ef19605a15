"""`ProcessingMethods`: TransformerLens' processing of weights, of the model and of state dicts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from hookedlm import transforms
from hookedlm.errors import ProcessingError
from hookedlm.state_dicts import StateDict, adopt, changed, checked, missing, some, twin_with

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer


class ProcessingMethods:
    """Every transform keeps log-probabilities, or is not applied."""

    def process_weights_(
        self: HookedTransformer,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        refactor_factored_attn_matrices: bool = False,
        *,
        fold_value_biases: bool = True,
        stacklevel: int = 2,
    ) -> None:
        """TransformerLens' processing, in its order; what can't be done here is warned of once.

        A second call changes nothing. ``model.history`` has the record. The warning points
        ``stacklevel`` callers up.
        """
        wanted = (
            (fold_ln, transforms.fold_ln),
            (center_writing_weights, transforms.center_writing_weights),
            (center_unembed, transforms.center_unembed),
            (fold_value_biases, transforms.fold_value_biases),
            (refactor_factored_attn_matrices, transforms.refactor_factored_attn_matrices),
        )
        skipped = []
        for wants, transform in wanted:
            if not wants:
                continue
            try:
                record = transform(self)
            except ProcessingError as error:
                skipped.append(str(error))
            else:
                skipped += _skipped(record)
        _warn(skipped, stacklevel + 1, " Pass the matching argument as False to say so yourself.")

    def remove_layernorm(self: HookedTransformer) -> None:
        """Take out the norms of a model trained to do without (`transforms.remove_layernorm`)."""
        transforms.remove_layernorm(self)

    # State dicts ----------------------------------------------------------------------------------

    def load_and_process_state_dict(
        self: HookedTransformer,
        state_dict: StateDict,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """Load weights by TransformerLens' names and process them; the dictionary is left alone.

        Missing weights stay as the model has them, and a warning names them; a dictionary without
        any norm holds folded weights. Raises InputError for unknown names and other shapes, before
        anything is changed. Hugging Face's module, if there is one, keeps its weights.
        """
        given = _filled(self, checked(self, state_dict), stacklevel=2)
        twin = twin_with(self, given)
        ProcessingMethods.process_weights_(
            twin,
            fold_ln,
            center_writing_weights,
            center_unembed,
            refactor_factored_attn_matrices,
            fold_value_biases=fold_value_biases,
            stacklevel=3,
        )
        adopt(self, twin)
        self.history[:] = twin.history
        self.cfg.normalization_type = twin.cfg.normalization_type

    def fill_missing_keys(self: HookedTransformer, state_dict: StateDict) -> dict[str, Tensor]:
        """A dictionary with the model's own weights where this one has none; a warning names them.

        Raises InputError for unknown names and other shapes.
        """
        filled = _filled(self, checked(self, state_dict), stacklevel=2)
        return dict(state_dict) | {name: x for name, x in filled.items() if name not in state_dict}

    def fold_layer_norm(
        self: HookedTransformer,
        state_dict: StateDict,
        fold_biases: bool = True,
        center_weights: bool = True,
    ) -> dict[str, Tensor]:
        """`transforms.fold_ln` of a state dict: ``ln1``, ``ln2`` and ``ln_final`` are gone from it.

        Like the four below: the dictionary given is left alone; InputError for names that are
        unknown or missing; ProcessingError where it would change what the model says; a warning
        names what was left as it is.
        """
        return _transformed(
            self, state_dict, lambda twin: transforms.fold_ln(twin, fold_biases, center_weights)
        )

    def center_writing_weights(self: HookedTransformer, state_dict: StateDict) -> dict[str, Tensor]:
        """`transforms.center_writing_weights` of a state dict: what writes to the stream has mean
        zero over d_model."""
        return _transformed(self, state_dict, transforms.center_writing_weights)

    def center_unembed(self: HookedTransformer, state_dict: StateDict) -> dict[str, Tensor]:
        """`transforms.center_unembed` of a state dict: ``W_U`` and ``b_U`` have mean zero over the
        vocabulary."""
        return _transformed(self, state_dict, transforms.center_unembed)

    def fold_value_biases(self: HookedTransformer, state_dict: StateDict) -> dict[str, Tensor]:
        """`transforms.fold_value_biases` of a state dict: ``b_V W_O`` is in ``b_O``."""
        return _transformed(self, state_dict, transforms.fold_value_biases)

    def refactor_factored_attn_matrices(
        self: HookedTransformer, state_dict: StateDict
    ) -> dict[str, Tensor]:
        """`transforms.refactor_factored_attn_matrices` of a state dict."""
        return _transformed(self, state_dict, transforms.refactor_factored_attn_matrices)


def _transformed(
    model: HookedTransformer,
    state_dict: StateDict,
    transform: Callable[[HookedTransformer], transforms.Record],
) -> dict[str, Tensor]:
    skipped: list[str] = []
    result = changed(model, state_dict, lambda twin: skipped.extend(_skipped(transform(twin))))
    _warn(skipped, stacklevel=4)
    return result


def _filled(model: HookedTransformer, given: StateDict, stacklevel: int) -> dict[str, Tensor]:
    absent = missing(model, given)
    if absent:
        warnings.warn(
            f"not in the state dict, and left as the model has it: {some(absent)}",
            stacklevel=stacklevel + 1,
        )
    return dict(given) | absent


def _skipped(record: transforms.Record) -> list[str]:
    return [f"{record.name}: {reason}" for reason in record.skipped[:1]]


def _warn(skipped: list[str], stacklevel: int, advice: str = "") -> None:
    if skipped:
        warnings.warn(
            "some processing does not apply to this model and was left out: "
            + " | ".join(skipped)
            + advice,
            stacklevel=stacklevel,
        )
