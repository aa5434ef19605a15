"""Our numbers beside Hugging Face's, when an encoder-decoder loads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hookedlm.convert.check import TOLERANCES, compare, within
from hookedlm.convert.encoder_decoder import truth_of
from hookedlm.errors import ConversionError

if TYPE_CHECKING:
    from hookedlm.encoder_decoder.model import HookedEncoderDecoder

LENGTHS = {"": 11, "decoder_": 6}
"""Positions of the encoder's and the decoder's input, where the model has as many."""


@torch.no_grad()
def check(model: HookedEncoderDecoder, hf_model: Any) -> None:
    """Compare with Hugging Face's model, unheard and with every hook on, on a padded batch and on
    one without masks, so that kernels which mask by themselves are seen at work. In half precision,
    where errors of rounding grow from block to block, the median position judges.

    Raises ConversionError when the encoder's output or the logits differ.
    """
    everywhere = [(lambda name: True, lambda x, hook: None)]
    for inputs in _batches(model):
        truth = truth_of(hf_model, inputs)
        for hooks in ([], everywhere):
            with model.hooks(fwd_hooks=hooks):
                _compare(model, inputs, truth)


def _batches(model: HookedEncoderDecoder) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens, masks = {}, {}
    for stack, length in LENGTHS.items():
        n = min(length, model.cfg.n_ctx)
        ids = torch.randint(model.cfg.d_vocab, (2, n), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, max(1, 2 * n // 3) :] = 0
        tokens[f"{stack}input_ids"] = ids.to(model.device)
        masks[f"{stack}attention_mask"] = mask.to(model.device)
    yield tokens | masks
    yield tokens


def _compare(
    model: HookedEncoderDecoder, inputs: dict[str, Tensor], truth: dict[str, Tensor]
) -> None:
    mask, said = (inputs.get(f"{stack}attention_mask") for stack in LENGTHS)
    encoded = model.encoder_output(inputs["input_ids"], mask)
    resid = model.decoder_output(inputs["decoder_input_ids"], encoded, mask, said)
    logits = model.hook_logits(model.unembed(resid))
    for name, x, real in (("encoder output", encoded, mask), ("logits", logits, said)):
        kept = x.new_ones(x.shape[:2]) if real is None else real
        agreement = compare(x, truth[name], kept.bool())
        if not within(agreement, model.dtype, reroutes=True):
            raise ConversionError(
                f"{name} differ from Hugging Face's by {agreement.error:.1e} (allowed "
                f"{TOLERANCES[model.dtype]:.0e})"
            )
