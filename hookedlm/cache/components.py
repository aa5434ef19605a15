"""`ComponentMethods`: what single heads and neurons write, and what that does to the logits."""

from __future__ import annotations

from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor

from hookedlm.cache.attribution import LNMode, TokenInput
from hookedlm.cache.collecting import CollectingMethods, Directions, joined, labels_of
from hookedlm.cache.ledger import Write, ledger
from hookedlm.cache.parts import Labels, Passed, Readings, Stack
from hookedlm.errors import CacheKeyError, InputError
from hookedlm.layers.attention import Attention
from hookedlm.slices import Slice, SliceInput


class ComponentMethods(CollectingMethods):
    """Heads and neurons, as vectors or as what a direction finds in them."""

    # Heads ----------------------------------------------------------------------------------------

    def compute_head_results(self) -> None:
        """Add ``blocks.L.attn.hook_result`` of every layer: what each head writes."""
        for i in range(self.model.cfg.n_layers):
            if self._attention(i) is not None:
                self[f"blocks.{i}.attn.hook_result"]

    @torch.no_grad()
    def compute_head_result(self, name: str) -> Float[Tensor, "*batch_pos head d_model"]:
        """``z W_O`` of every head of one layer. Raises CacheKeyError without uniform heads."""
        attn = self.model.mod_dict.get(name.removesuffix(".hook_result"))
        if not isinstance(attn, Attention):
            raise CacheKeyError(f"{name!r}: attention there has no uniform heads")
        z = self[name.replace("hook_result", "hook_z")]
        batched = z if z.ndim == 4 else z[None]
        result = attn.result(batched.to(attn.W_O.device)).to(z.device)
        return result if z.ndim == 4 else result[0]

    def stack_head_results(
        self,
        layer: int = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: SliceInput = None,
        apply_ln: bool | LNMode = False,
    ) -> Stack | tuple[Stack, Labels]:
        """What every head of the layers below ``layer`` adds to the stream that enters it.

        Returns ``[component, batch, pos, d_model]``, labels ``L0H0``...; post-norms and residual
        multipliers applied. ``incl_remainder`` adds ``remainder``: the rest of the stream.
        """
        pos = Slice(pos_slice)
        stack, labels = self._components(layer, pos, self._heads(pos), incl_remainder, apply_ln)
        return (stack, labels()) if return_labels else stack

    def head_logit_attrs(
        self,
        tokens: TokenInput,
        incorrect_tokens: TokenInput | None = None,
        pos_slice: SliceInput = None,
        return_labels: bool = False,
    ) -> Float[Tensor, "head *batch_pos"] | tuple[Float[Tensor, "head *batch_pos"], Labels]:
        """How much each head adds to the logit of ``tokens`` (minus that of ``incorrect_tokens``).

        Equals ``logit_attrs(stack_head_results(), ...)``, computed as ``z · (W_O @ direction)``:
        no head's ``d_model`` vector is made. Tokens as in `logit_attrs`.
        """
        pos = Slice(pos_slice)
        attrs, labels = self._token_attrs(tokens, incorrect_tokens, pos, self._heads(pos))
        return (attrs, labels()) if return_labels else attrs

    # Neurons --------------------------------------------------------------------------------------

    @torch.no_grad()
    def get_neuron_results(
        self, layer: int, neuron_slice: SliceInput = None, pos_slice: SliceInput = None
    ) -> Float[Tensor, "*batch_pos neuron d_model"]:
        """What each neuron of one layer adds to the stream: ``post * W_out``, then the post-norm
        (its scale frozen) and multiplier of the family. An int drops the axis it selects from.

        Raises InputError where the MLP has no neurons of its own (mixtures of experts).
        """
        selected = Slice(neuron_slice)
        n = self.model.cfg.n_layers
        if not -n <= layer < n:
            raise InputError(f"layer={layer}: this model has layers 0 to {n - 1}")
        write = Write(layer % n, "mlp")
        part = self._neurons(Slice(pos_slice), Slice.unwrap(selected))(write)
        if part is None:
            raise InputError(
                f"layer {layer} has no neurons that write to the stream by themselves; its parts: "
                "print model.hook_points() and model.fidelity()"
            )
        results = part.outs()
        return results[0] if selected.mode == "int" else results.movedim(0, -2)

    def stack_neuron_results(
        self,
        layer: int,
        pos_slice: SliceInput = None,
        neuron_slice: SliceInput = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool | LNMode = False,
        project_output_onto: Directions | None = None,
    ) -> Stack | Readings | tuple[Stack | Readings, Labels]:
        """What every neuron of the layers below ``layer`` adds to the stream that enters it.

        Returns ``[component, batch, pos, d_model]``, labels ``L0N0``..., post-norms and residual
        multipliers applied; ``incl_remainder`` adds ``remainder``, the rest of the stream. With
        ``project_output_onto`` ``[d_model]`` or ``[d_model, out]``: its products with these,
        ``[component, batch, pos]`` or ``[component, batch, pos, out]``, and no vector is made.
        """
        pos = Slice(pos_slice)
        expand = self._neurons(pos, Slice.unwrap(neuron_slice))
        stack, labels = self._components(
            layer, pos, expand, incl_remainder, apply_ln, project_output_onto
        )
        return (stack, labels()) if return_labels else stack

    def neuron_logit_attrs(
        self,
        tokens: TokenInput,
        incorrect_tokens: TokenInput | None = None,
        pos_slice: SliceInput = None,
        neuron_slice: SliceInput = None,
        return_labels: bool = False,
    ) -> Float[Tensor, "neuron *batch_pos"] | tuple[Float[Tensor, "neuron *batch_pos"], Labels]:
        """How much each neuron adds to the logit of ``tokens`` (minus that of
        ``incorrect_tokens``).

        Equals ``logit_attrs(stack_neuron_results(-1), ...)``, computed as
        ``post * (W_out @ direction)``: memory for one number a neuron, not ``d_model``. Tokens as
        in `logit_attrs`; ``neuron_slice`` selects in every layer.
        """
        pos = Slice(pos_slice)
        expand = self._neurons(pos, Slice.unwrap(neuron_slice))
        attrs, labels = self._token_attrs(tokens, incorrect_tokens, pos, expand)
        return (attrs, labels()) if return_labels else attrs

    # Everything -----------------------------------------------------------------------------------

    @torch.no_grad()
    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool | LNMode = False,
        pos_slice: SliceInput = None,
        return_labels: bool = False,
        project_output_onto: Directions | None = None,
    ) -> Stack | Readings | tuple[Stack | Readings, Labels]:
        """The stream that enters ``layer`` (None: the end) as heads, neurons, embeddings and bias.

        Returns ``[component, batch, pos, d_model]``, which sums to the stream: heads, neurons (or,
        without ``expand_neurons``, ``0_mlp_out``...), writes that can't be taken apart, ``embed``,
        ``pos_embed``, and ``bias``: what attention, MLPs and post-norms add whatever they read.
        ``project_output_onto`` as in `stack_neuron_results`. Of the final norm's bias and ``b_U``
        it says nothing: they are not in the stream.
        """
        pos, end = Slice(pos_slice), self._layer(layer)
        heads, neurons = self._heads(pos), self._neurons(pos, Slice())

        def mlps(write: Write) -> Passed | None:
            return neurons(write) if expand_neurons else None

        reading = self._projection(project_output_onto, end, mlp_input, apply_ln, pos)
        steps = list(ledger(self.model, end, mlp_input))
        collected = [self._collected(steps, expand, pos, reading) for expand in (heads, mlps)]
        found, parts = (list(chain(*each)) for each in zip(*collected, strict=True))
        names, rest = self._unexpanded(steps, (heads, mlps), pos)
        if reading is None:
            stack = torch.cat([*found, torch.stack(rest)])
            stack = self._normed(stack, apply_ln, end, mlp_input, pos)
        else:
            stack = joined([*found, reading.of(torch.stack(rest))], project_output_onto)
        return (stack, labels_of(parts) + names) if return_labels else stack
