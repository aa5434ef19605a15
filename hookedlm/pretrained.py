"""`PretrainedMethods`: the two doors through which Hugging Face models come in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from hookedlm.checkpoints import checkpoint_fields, where_kept
from hookedlm.errors import ConversionError
from hookedlm.loading import load_layers

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer

Side = Literal["left", "right"]


class PretrainedMethods:
    """`load` and `from_pretrained`."""

    @classmethod
    def load(
        cls: type[HookedTransformer],
        model: str | Path | nn.Module,
        tokenizer: Any = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        revision: str | None = None,
        strict: bool = False,
        *,
        default_prepend_bos: bool | None = None,
        default_padding_side: Side = "right",
        **kwargs: Any,
    ) -> HookedTransformer:
        """Hugging Face's numbers: nothing folded, every block checked. See `hookedlm.load`."""
        loaded = load_layers(model, tokenizer, dtype, device, revision, strict, **kwargs)
        if default_prepend_bos is not None:
            loaded.cfg.default_prepend_bos = default_prepend_bos
        if loaded.layers is not None:
            vars(loaded.cfg)["layers_read"] = loaded.layers
        hooked = cls(
            loaded.cfg,
            loaded.tokenizer,
            move_to_device=False,
            default_padding_side=default_padding_side,
        )
        if loaded.weights is not None:
            hooked.load_and_process_state_dict(loaded.weights, *[False] * 4)
        if loaded.layers is not None and hooked.conversion is not loaded.layers.fidelity:
            raise ConversionError(
                f"{cls.__name__}.__init__ gave another config to HookedTransformer.__init__ than "
                "it was given, and with it lost the checkpoint's weights: pass on the same object"
            )
        if loaded.device is not None or loaded.dtype is not None:
            hooked.to(device=loaded.device or hooked.device, dtype=loaded.dtype)
        hooked.eval()
        return hooked

    @classmethod
    def from_pretrained(
        cls: type[HookedTransformer],
        model_name: str,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        refactor_factored_attn_matrices: bool = False,
        checkpoint_index: int | None = None,
        checkpoint_value: int | None = None,
        hf_model: nn.Module | None = None,
        device: str | torch.device | None = None,
        n_devices: int = 1,
        tokenizer: Any = None,
        move_to_device: bool = True,
        fold_value_biases: bool = True,
        default_prepend_bos: bool | None = None,
        default_padding_side: Side = "right",
        dtype: str | torch.dtype = "float32",
        first_n_layers: int | None = None,
        n_ctx: int | None = None,
        **from_pretrained_kwargs: Any,
    ) -> HookedTransformer:
        """The classic door: TransformerLens' arguments and defaults, weights processed.

        Processing keeps log-probabilities; what would not, for this family, is skipped with one
        warning that says why (``model.history`` has the record). ``checkpoint_value`` is a training
        step whose weights were published (`hookedlm.checkpoints`), ``checkpoint_index`` its place
        among them.
        """
        if n_devices != 1:
            raise NotImplementedError("n_devices: one device holds the model; choose it by device=")
        step: dict[str, Any] = {}
        if checkpoint_index is not None:
            step = checkpoint_fields(model_name, checkpoint_index, None)
            checkpoint_value = step["checkpoint_value"]
        elif checkpoint_value is not None:
            step = {"from_checkpoint": True, "checkpoint_value": checkpoint_value}
        if checkpoint_value is not None:
            from_pretrained_kwargs |= where_kept(model_name, checkpoint_value)
        hooked = cls.load(
            model_name,
            tokenizer,
            dtype,
            device if move_to_device else "cpu",
            default_prepend_bos=default_prepend_bos,
            default_padding_side=default_padding_side,
            hf_model=hf_model,
            first_n_layers=first_n_layers,
            n_ctx=n_ctx,
            **from_pretrained_kwargs,
        )
        vars(hooked.cfg).update(step)
        hooked.process_weights_(
            fold_ln,
            center_writing_weights,
            center_unembed,
            refactor_factored_attn_matrices,
            fold_value_biases=fold_value_biases,
            stacklevel=3,
        )
        return hooked

    @classmethod
    def from_pretrained_no_processing(
        cls: type[HookedTransformer],
        model_name: str,
        fold_ln: bool = False,
        center_writing_weights: bool = False,
        center_unembed: bool = False,
        refactor_factored_attn_matrices: bool = False,
        fold_value_biases: bool = False,
        dtype: str | torch.dtype = torch.float32,
        default_prepend_bos: bool | None = None,
        default_padding_side: Side = "right",
        **from_pretrained_kwargs: Any,
    ) -> HookedTransformer:
        """`from_pretrained` with all processing off: Hugging Face's numbers."""
        return cls.from_pretrained(
            model_name,
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
            fold_value_biases=fold_value_biases,
            dtype=dtype,
            default_prepend_bos=default_prepend_bos,
            default_padding_side=default_padding_side,
            **from_pretrained_kwargs,
        )
