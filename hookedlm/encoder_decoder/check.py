"""Our numbers beside Hugging Face's, when an encoder-decoder loads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hookedlm.convert.encoder_decoder import Mask, truth_of

if TYPE_CHECKING:
    from hookedlm.encoder_decoder.model import HookedEncoderDecoder

LENGTHS = {"": 11, "decoder_": 6}
"""Positions of the encoder's and the decoder's input, where the model has as many."""


@torch.no_grad()
def check(model: HookedEncoderDecoder, hf_model: Any) -> None:
    """Compare with Hugging Face's model on a padded batch and on one without masks, so that kernels
    which mask by themselves are seen at work.

    Raises ConversionError when the encoder's output or the logits differ.
    """
    for inputs in _batches(model):
        mask, said = (inputs.get(f"{stack}attention_mask") for stack in LENGTHS)
        run = partial(_run, model, inputs["input_ids"], inputs["decoder_input_ids"], mask, said)
        model._confirm(run, truth_of(hf_model, inputs), {"encoder output": mask, "logits": said})


def _run(
    model: HookedEncoderDecoder, tokens: Tensor, says: Tensor, mask: Mask, said: Mask
) -> dict[str, Tensor]:
    encoded = model.encoder_output(tokens, mask)
    resid = model.decoder_output(says, encoded, mask, said)
    return {"encoder output": encoded, "logits": model.hook_logits(model.unembed(resid))}


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
