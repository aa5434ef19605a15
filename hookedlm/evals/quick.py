"""Two measures without any data: the loss on a paragraph, and on random tokens that repeat."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hookedlm.errors import InputError, TokenizerError
from hookedlm.loss import lm_cross_entropy_loss
from hookedlm.model import HookedTransformer

PARAGRAPH = (
    "Water covers most of the surface of the Earth. The sun warms it, and some of it rises into "
    "the air as vapour. High above the ground the air is cold, so the vapour turns back into tiny "
    "drops, which we see as clouds. When the drops become too heavy they fall as rain or snow. The "
    "rain fills rivers and lakes, and the rivers carry the water back to the sea, where the cycle "
    "begins again."
)


def sanity_check(model: HookedTransformer) -> Float[Tensor, ""]:
    """The loss, in nats per token, on one paragraph of plain English.

    A language model of any size has a few nats here, one with broken weights ten or more. The
    paragraph is cut to ``cfg.n_ctx`` tokens.
    """
    tokens = model.to_tokens(PARAGRAPH, truncate=False)[:, : model.cfg.n_ctx]
    with torch.no_grad():
        return model(tokens, return_type="loss")


@torch.no_grad()
def induction_loss(
    model: HookedTransformer,
    tokenizer: Any = None,
    batch_size: int = 4,
    subseq_len: int = 384,
    prepend_bos: bool | None = None,
    device: str | torch.device | None = None,
    *,
    seed: int = 0,
) -> Float[Tensor, ""]:
    """The loss, in nats per token, on the second time that random tokens are read.

    Each of ``batch_size`` rows is ``subseq_len`` tokens, drawn evenly from the vocabulary under
    ``seed`` (special ones left out, if there is a tokenizer), then the same again. The first token
    of the repeat, which nothing announces, does not count. ``prepend_bos`` None follows
    ``cfg.default_prepend_bos``. ``device`` is where the tokens are put, the model's by default.

    Raises InputError when the rows are longer than ``cfg.n_ctx``, TokenizerError when a BOS is
    wanted and there is none. Source: "In-context Learning and Induction Heads" (2022).
    """
    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    prepend = model.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
    n_bos, n_ctx = int(prepend), model.cfg.n_ctx
    if not 2 <= subseq_len <= (n_ctx - n_bos) // 2:
        raise InputError(
            f"subseq_len={subseq_len}: read twice, after {n_bos} BOS, in the {n_ctx} positions of "
            f"this model (cfg.n_ctx), it can be 2 to {(n_ctx - n_bos) // 2}"
        )
    ids = torch.arange(model.cfg.d_vocab)
    if tokenizer is not None:
        known = ids < len(tokenizer)
        ids = ids[known & ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids).long())]
    generator = torch.Generator().manual_seed(seed)
    half = ids[torch.randint(len(ids), (batch_size, subseq_len), generator=generator)]
    tokens = torch.cat([half, half], dim=1)
    if prepend:
        bos = None if tokenizer is None else tokenizer.bos_token_id
        if bos is None:
            raise TokenizerError("there is no BOS token to put in front: pass prepend_bos=False")
        tokens = torch.cat([torch.full((batch_size, 1), bos), tokens], dim=1)
    tokens = tokens.to(model.device if device is None else device)
    logits = model(tokens, attention_mask=torch.ones_like(tokens))
    losses = lm_cross_entropy_loss(logits, tokens, per_token=True)
    return losses[:, n_bos + subseq_len :].mean()
